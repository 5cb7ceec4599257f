"""A module's own chat template, and texts instead of chats: what they write, where answers end, and what is refused."""

from datetime import datetime

import pytest
from training_data import chat, tokenizers, with_template

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import TEMPLATES, ChatStyle, parse_style, read_template, style_values
from pshare_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.host

TALK = [*chat("q", "a", "r", system="Be kind."), {"role": "assistant", "content": "b"}]
WRITTEN = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n",
    "plain": "System:\nBe kind.\n\nUser:\nq\n\nAssistant:\na{eos}\n\nUser:\nr\n\nAssistant:\n",
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def toks(root):
    return tokenizers(root)


def bare(root, tmp_path, family: str, **config) -> Tokenizer:
    """A family's tokenizer without a template."""
    return with_template(root, tmp_path, family, None, **config)


@pytest.mark.parametrize(("name", "family"), [("chatml", "smollm"), ("plain", "smollm"), ("plain", "gemma3")])
def test_a_named_template_is_as_good_as_the_bases(root, toks, tmp_path, name, family):
    """The ids are those of a base that has it, with tools and calls too, and texts of control tokens stay texts."""
    ours = bare(root, tmp_path, family)
    twin = ours.with_template(TEMPLATES[name])
    style = ChatStyle(template=TEMPLATES[name])
    asked = ours.encode_chat(TALK[:-1], style=style)
    eos = ours.special_tokens["eos_token"]
    assert ours.decode(asked, skip_special_tokens=False) == WRITTEN[name].format(eos=eos)
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Z"}}}]}
    for messages in (TALK[:-1], chat(f"say {eos} <|im_start|>user"), [*chat("x"), called, *chat("y")]):
        for tools in (None, TOOLS):
            assert ours.encode_chat(messages, tools=tools, style=style) == twin.encode_chat(messages, tools=tools)
    assert ours.tool_format(style) == twin.tool_format()
    assert ours.tool_format() is None
    # It goes before a template that the base has.
    assert toks[family].encode_chat(TALK[:-1], style=style) == asked


def test_answers_end_where_the_template_ends_them(root, tmp_path):
    ours = bare(root, tmp_path, "smollm", eos_token="<|endoftext|>")
    [im_end, eos] = (ours.encode(text, add_special_tokens=False)[0] for text in ("<|im_end|>", "<|endoftext|>"))
    ends = {name: ours.turn_ends(ChatStyle(template=source)) for name, source in TEMPLATES.items()}
    # The unknown token of this family is no control token.
    assert ends["chatml"] == {im_end}
    assert im_end != eos
    assert ours.turn_ends() == frozenset()
    (tmp_path / "llama").mkdir()
    llama = bare(root, tmp_path / "llama", "llama")
    assert llama.turn_ends(ChatStyle(template=TEMPLATES["plain"])) == {llama.eos_id}
    with pytest.raises(PshareError, match=r"'<\|im_end\|>', which is no control token of this base.* plain"):
        llama.turn_ends(ChatStyle(template=TEMPLATES["chatml"]))


def test_questions_are_chats_or_texts(root, toks, tmp_path):
    ours, own = bare(root, tmp_path, "llama"), ChatStyle(template=TEMPLATES["plain"])
    texts = ChatStyle(text_prompt="Q: {prompt}\nA:")
    assert [ours.reads_chats(style) for style in (ChatStyle(), own, texts)] == [False, True, False]
    assert [toks["llama"].reads_chats(style) for style in (ChatStyle(), own, texts)] == [True, True, False]
    assert ours.encode_question("{prompt} {x}") == ours.encode("{prompt} {x}")
    assert ours.encode_question("1+1?", own) == ours.encode_chat(chat("1+1?"), style=own)
    for tokenizer in (ours, toks["llama"]):
        assert tokenizer.encode_question("{x}?", texts) == ours.encode("Q: {x}?\nA:")
    with pytest.raises(PshareError, match="no chat template"):
        ours.encode_chat(chat("x"))


def test_an_own_template_tells_the_clock(toks):
    style = ChatStyle(template="{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}")
    ours = toks["llama"]
    _ = ours.encode_chat(chat("x"), style=style)
    assert ours.decode(ours.at(datetime(1999, 1, 1)).encode_chat(chat("x"), style=style)) == "1999x"


def test_settings(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_bytes("{{ messages[0].content }} ü\r\n".encode())
    assert read_template(None, "k") is None
    assert [read_template(name, "k") for name in TEMPLATES] == list(TEMPLATES.values())
    source = read_template(str(file), "k")
    assert source == "{{ messages[0].content }} ü\r\n"
    assert read_template(source, "k") == source
    (tmp_path / "latin.jinja").write_bytes(b"\xff")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    for value, words in (
        ("llama9", "k must be chatml, plain or the file"),
        ("", "k must be"),
        (str(tmp_path), "directory"),
        (str(tmp_path / "latin.jinja"), "latin"),
    ):
        with pytest.raises(PshareError, match=rf"^[^\n]*{words}"):
            read_template(value, "k")
    for style in (ChatStyle(template="x"), ChatStyle(text_prompt="{prompt}\n", system="last")):
        assert parse_style(None, style_values(style).get("layout"), **own(style)) == style
    for values, words in (
        ({"text_prompt": "x"}, "m.text_prompt .* once, not 'x'"),
        ({"text_prompt": "{prompt}{prompt}"}, "once"),
        ({"text_prompt": 3}, "text_prompt"),
        ({"template": 3}, "m.template"),
        (
            {"template": read_template(str(tmp_path / "bad.jinja"), "k")},
            "m.chat_template: The chat template is not valid Jinja",
        ),
        ({"template": "x", "text_prompt": "{prompt}"}, "leave out either"),
    ):
        with pytest.raises(PshareError, match=words):
            parse_style(None, None, "m.", **values)


def own(style: ChatStyle) -> dict:
    return {name: value for name, value in style_values(style).items() if name != "layout"}
