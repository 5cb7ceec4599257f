"""Layouts: agents with system prompts of their own share one history; begun answers go on within a chat."""

import pytest
from chats import (
    TOOL_TEMPLATES,
    called,
    controls,
    result,
    tokenizer_folders,
    tokenizer_with_template,
    tool_tokenizers,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pshare_jax.errors import PshareError
from pshare_jax.share.boundary import base_len
from pshare_jax.text.chat_style import ChatLayout, ChatStyle, parse_style, style_values
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.text.tool_format import FORMATS, ToolFormat, format_value, parse_format

LAST, DROP = ChatStyle(system="last"), ChatStyle(system="drop")
WORDS = st.text("abcé .", min_size=1, max_size=8).map(lambda text: f"w{text}w")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tool_tokenizers(tmp_path_factory.mktemp("tool-tokenizers"))


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def tool(name: str) -> list[dict]:
    return [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}]


@st.composite
def histories(draw) -> tuple[list[dict], list[str]]:
    """Questions and answers, some by way of a function, and the texts in them; the last message may be any."""
    messages, texts = [], []
    for _ in range(draw(st.integers(1, 3))):
        turn = user(draw(WORDS))
        if draw(st.booleans()):
            turn += [called({"city": draw(WORDS)}), result(draw(WORDS))]
        messages += [*turn, assistant(draw(WORDS))]
    messages += user(draw(WORDS))
    kept = messages[: draw(st.integers(1, len(messages)))]
    if kept[-1].get("tool_calls"):
        kept.pop()
    texts = [message["content"] for message in kept if message.get("content")]
    return kept, texts


def common(one: list[int], other: list[int]) -> list[int]:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def in_order(texts: list[str], whole: str) -> bool:
    at = 0
    for text in texts:
        at = whole.find(text, at) + len(text)
        if at < len(text):
            return False
    return True


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_agents_share_the_history(tokenizers, name):
    """With `last` the prompts of two agents, at once or after the history has grown, begin with the whole history."""
    ours = tokenizers[name]

    @given(histories(), WORDS, WORDS, st.booleans())
    @settings(max_examples=25, deadline=None)
    def check(history, one, other, tools):
        messages, texts = history
        one, other = f"I am {one}!", f"You are {other}?"
        with_tools = [tool("f"), tool("g")] if tools and ours.tool_format() else [None, None]
        first = ours.encode_chat([system(one), *messages], tools=with_tools[0], style=LAST)
        second = ours.encode_chat([system(other), *messages], tools=with_tools[1], style=LAST)
        assert in_order(texts, ours.decode(common(first, second)))
        assert in_order([*texts, one], ours.decode(first))
        assert ours.decode(first).count(one) == 1
        # The next agent continues the history; an unfinished turn is answered first.
        grown = [*messages, *([] if messages[-1]["role"] == "assistant" else [assistant("ANSWER")]), *user("NEXT")]
        third = ours.encode_chat([system(other), *grown], style=LAST)
        shared = common(first, third)
        assert in_order(texts[:-1], ours.decode(shared))
        dropped = [ours.encode_chat([system(text), *messages], style=DROP) for text in (one, other)]
        assert dropped[0] == dropped[1] == ours.encode_chat(messages)

    check()


def test_the_system_message_stands_where_the_layout_says(tokenizers):
    messages = [
        system("S1"),
        {"role": "developer", "content": "S2"},
        *user("U1"),
        assistant("A"),
        system("MID"),
        *user("U2"),
    ]
    for name, places in {
        "plain": {"first": "S1 S2 U1 A MID U2", "last": "U1 A MID U2 S1 S2", "drop": "U1 A MID U2"},
        "mistral": {"last": "U1 A U2 S1"},
        "gemma3": {"first": "S1 U1 A U2", "last": "U1 A U2 S1", "drop": "U1 A U2"},
    }.items():
        kept = messages if name == "plain" else [messages[0], *messages[2:4], messages[5]]
        for layout, order in places.items():
            text = tokenizers[name].decode(
                tokenizers[name].encode_chat(kept, style=parse_style(None, {"system": layout}))
            )
            marks = order.split()
            assert in_order(marks, text)
            assert [mark in text for mark in ("S1", "S2")] == [mark in marks for mark in ("S1", "S2")]
    for name in ("plain", "gemma3"):
        with pytest.raises(PshareError, match="add a user's message"):
            tokenizers[name].encode_chat([system("S")], style=DROP)
    # Without a history there is nothing to share.
    for name, ours in tokenizers.items():
        if name not in ("gemma3", "qwen3"):
            assert ours.encode_chat([system("S")], style=LAST) == ours.encode_chat([system("S")])


def test_a_developers_message_moves_where_the_template_knows_the_role(tmp_path):
    root = tokenizer_folders(tmp_path / "families")
    template = "{% for m in messages %}{{ '<D>' if m.role == 'developer' else '<O>' }}{{ m.content }}{% endfor %}"
    ours = tokenizer_with_template(root, tmp_path, "smollm", template)
    messages = [{"role": "developer", "content": "ROLE"}, *user("a"), assistant("b"), *user("c")]
    texts = [ours.decode(ours.encode_chat(messages, style=style)) for style in (ChatStyle(), LAST, DROP)]
    assert texts[0] == "<D>ROLE<O>a<O>b<O>c"
    assert texts[1].startswith("<O>a<O>b<O>c")
    assert texts[1].endswith("ROLE")
    assert texts[2] == "<O>a<O>b<O>c"


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@pytest.mark.parametrize("layout", ["first", "last", "drop"])
def test_training_writes_the_answer_behind_the_servers_prompt(tokenizers, name, layout):
    ours, style = tokenizers[name], ChatStyle(FORMATS["json_list"], layout)
    messages = [system("ROLE"), *user("QUESTION")]
    for answer, text in (
        (assistant("ANSWER"), "ANSWER"),
        (called({"city": "x"}), '[{"name": "weather", "arguments": {"city": "x"}}]'),
    ):
        if name == "mistral" and answer.get("tool_calls"):
            continue
        prompt, target = ours.encode_turn(messages, answer, tools=tool("weather"), style=style)
        assert prompt == ours.encode_chat(messages, tools=tool("weather"), style=style)
        assert ours.decode(target).removeprefix("<think>\n\n</think>\n\n").strip() == text
        assert ("ROLE" in ours.decode(prompt)) is (layout != "drop")
        begun, start = ours.encode_begun([*messages, assistant("ANS")], tools=tool("weather"), style=style)
        assert start is not None
        assert begun[:start] == prompt[:start]


# --- begun answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_begun_answers_equal_transformers(folders, tokenizers, name):
    """Case N1-10: the ids of the rendered text cut after the content; the begun text is the module's."""
    ours, theirs = tokenizers[name], AutoTokenizer.from_pretrained(folders[name])
    pieces = ["a", " the", "\n", "\n\n", " ", "é", "<think>", "</think>", "The capital is"]

    @given(st.lists(st.sampled_from(pieces), max_size=4).map("".join), st.booleans())
    @settings(max_examples=25, deadline=None)
    def check(text, longer):
        before = [*user("Why?"), assistant("So."), *user("And?")] if longer else user("Where?")
        ids, start = ours.encode_begun([*before, assistant(text)])
        prompt = ours.encode_chat(before)
        if not text.strip():
            assert (ids, start) == (prompt, None)
            return
        if name == "qwen3" and "</think>" in text:
            # It cuts finished thoughts away, which transformers refuses.
            return
        messages = [*before, assistant(text)]
        rendered = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        assert ids == theirs.encode(rendered, add_special_tokens=False)
        assert start is not None
        assert 0 < base_len(len(ids), start) < len(ids)
        assert ids[:start] == common(ids, prompt)
        written = ours.decode(ids[start:], skip_special_tokens=False)
        assert text.strip() in written or start < len(prompt)

    check()


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_what_a_begun_answer_may_be(tokenizers, name):
    ours = tokenizers[name]
    plain = [*user("x"), assistant("Paris is")]
    ids, start = ours.encode_begun(plain)
    assert ours.encode_begun([*user("x"), {**assistant("Paris is"), "prefix": True}]) == (ids, start)
    assert ours.decode(ids[start:]).removeprefix("<think>\n\n</think>\n\n").strip() == "Paris is"
    for bad in ([*user("x")], [*user("x"), called({})], [*plain, *user("y")]):
        with pytest.raises(PshareError, match="last message"):
            ours.encode_begun(bad)
    with pytest.raises(PshareError, match="a message before it"):
        ours.encode_begun([assistant("Paris is")])
    # Text of the begun answer never becomes a control token.
    for control in ours.special_ids:
        text = f"say {ours.token_bytes(control).decode()} twice"
        if not text.isprintable() or "unk" in text:
            continue
        forged, _ = ours.encode_begun([*user("x"), assistant(text)])
        assert controls(ours, forged) == controls(ours, ids)
        assert text in ours.decode(forged, skip_special_tokens=False)
    with_system, at = ours.encode_begun([system("ROLE"), *plain], style=LAST)
    assert at is not None
    assert "ROLE" in ours.decode(with_system[:at])
    assert "Paris" in ours.decode(with_system[at:])


def test_private_use_characters_in_a_begun_answer_stay(tokenizers):
    strange = "\ue000\ue001 \U000f0000"
    ids, start = tokenizers["plain"].encode_begun([*user("\ue002"), assistant(strange)])
    assert tokenizers["plain"].decode(ids[start:]) == strange


def test_chats_with_all_private_use_characters_are_refused(tokenizers):
    """They leave none for our own marks."""
    ours, every = tokenizers["plain"], user("".join(map(chr, range(0xE000, 0xF900))))
    control = ChatStyle(ToolFormat("custom", "<|im_start|>call", "<|im_end|>"))
    for refused in (
        lambda: ours.encode_begun([*every, assistant("begun")]),
        lambda: ours.encode_chat(every, tools=tool("weather"), style=control),
    ):
        with pytest.raises(PshareError, match="private use"):
            refused()
    assert ours.encode_chat(every)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [*FORMATS.values(), ToolFormat("custom", "<f>", "</f>", "list", "input"), None])
@pytest.mark.parametrize("layout", ["first", "last", "drop"])
def test_styles_survive_a_manifest(form, layout):
    style = ChatStyle(form, layout)
    values = style_values(style)
    assert parse_style(values.get("tool_format"), values.get("layout")) == style
    assert form is None or parse_format(format_value(form), "x") == form


@pytest.mark.parametrize(
    ("form", "layout", "words"),
    [
        ("xml", None, "a.tool_format 'xml' hermes json_list"),
        (5, None, "a.tool_format name object"),
        ({"begin": "x"}, None, "a.tool_format 'begin' start"),
        ({"start": 5}, None, "a.tool_format.start text"),
        ({"body": "xml"}, None, "a.tool_format.body object list"),
        ({"arguments_key": "name"}, None, "a.tool_format.arguments_key"),
        ({"start": " \n"}, None, "a.tool_format.start blanks"),
        ({"end": "x"}, None, "a.tool_format.end start"),
        (None, {"system": "middle"}, "a.layout.system first last drop 'middle'"),
        (None, {"tools": "last"}, "a.layout system"),
        (None, "last", "a.layout system"),
    ],
)
def test_wrong_styles_are_refused_in_one_sentence(form, layout, words):
    with pytest.raises(PshareError, match=r"^[^\n]*$") as caught:
        parse_style(form, layout, "a.")
    assert all(word in str(caught.value) for word in words.split())


def test_a_layout_of_a_config_is_a_style():
    assert ChatLayout().system == ChatStyle().system == "first"
