"""Chats: ids equal to transformers'."""

import json
from itertools import pairwise

import pytest
from chats import CALL, FAMILIES, controls, tokenizer_folders, tokenizer_with_template, user
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pshare_jax.errors import PshareError
from pshare_jax.text.tokenizer import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
AGENT = [
    {"role": "system", "content": "  Be kind. "},
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "rain & 12°"},
    {"role": "user", "content": "So?"},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tokenizer_folders(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def pairs(root):
    return {
        family: (Tokenizer.from_folder(root / family), AutoTokenizer.from_pretrained(root / family))
        for family in FAMILIES
    }


def with_template(root, tmp_path, family: str, template, **config) -> tuple[Tokenizer, object]:
    """A family's tokenizer with another chat template, here and in transformers."""
    return tokenizer_with_template(root, tmp_path, family, template, **config), AutoTokenizer.from_pretrained(tmp_path)


def reference(theirs, messages, **kwargs) -> list[int]:
    return theirs.apply_chat_template(messages, tokenize=True, **{"add_generation_prompt": True, **kwargs})["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_chats_equal_transformers(pairs, family):
    ours, theirs = pairs[family]
    texts = st.one_of(
        st.text(max_size=30), st.sampled_from(["", " <", "> x", "<think>a</think>\n\nb", "\ue000|im_", "_"])
    )

    # Gemma's template writes a system message with the message behind it only.
    @given(st.lists(texts, min_size=2, max_size=5), st.booleans(), st.booleans())
    @settings(max_examples=60, deadline=None)
    def check(contents, system, prompt):
        roles = [*(["system"] if system else []), *["user", "assistant"] * 3]
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
        ids = ours.encode_chat(messages, add_generation_prompt=prompt)
        assert ids == reference(theirs, messages, add_generation_prompt=prompt)

    check()


@pytest.mark.parametrize("family", ["llama", "smollm", "qwen3"])
def test_tool_histories_and_kwargs_equal_transformers(pairs, family):
    """A1-05: null content, tool calls and tool answers."""
    ours, theirs = pairs[family]
    reasoned = [*AGENT, {"role": "assistant", "content": "ok", "reasoning": "hm"}, *user("and?")]
    # SmolLM2's template has no place for tools.
    for tools in (None,) if family == "smollm" else (None, TOOLS):
        for messages in (AGENT, AGENT[:4], reasoned, reasoned[:-1]):
            ids = ours.encode_chat(messages, tools=tools, template_kwargs={"enable_thinking": False})
            assert ids == reference(theirs, messages, tools=tools, enable_thinking=False)


def test_control_text_formed_by_template_and_content_is_refused(root, tmp_path):
    template = "{% for m in messages %}<|im_start|>{{ m.role }}<{{ m.content }}>{{ m.name }}<|im_end|>{% endfor %}"
    ours, theirs = with_template(root, tmp_path, "smollm", template)
    assert controls(ours, reference(theirs, user("|im_end|"))) != controls(ours, reference(theirs, user("a")))
    with pytest.raises(PshareError, match="control tokens"):
        ours.encode_chat(user("|im_end|"))
    assert ours.encode_chat(user("im_end")) == reference(theirs, user("im_end"))


def test_control_text_formed_by_two_fields_or_a_filter_is_refused(root, tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content | replace('CUT', '') }}{{ m.name }}{% endfor %}"
    )
    ours, theirs = with_template(root, tmp_path, "smollm", template)
    split = [{"role": "user", "content": "a<|im_", "name": "end|>"}]
    for messages in (split, user("a<|im_CUTend|>")):
        assert len(controls(ours, reference(theirs, messages))) == 2
        with pytest.raises(PshareError, match="control tokens"):
            ours.encode_chat(messages)


def test_templates_may_build_control_tokens_from_roles_and_read_content(root, tmp_path):
    template = (
        "{% for m in messages %}{{ '<|' + ('im_start' if m.role == 'user' else 'im_end') + '|>' }}"
        "{% if m.content == 'special' or '</think>' in m.content %}<|endoftext|>{% endif %}"
        "{% generation %}{{ m.content.split('</think>')[-1] | trim }}{% endgeneration %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
    )
    ours, theirs = with_template(root, tmp_path, "smollm", template)
    for text in ("plain", "special", " > a < "):
        assert ours.encode_chat(user(text) * 4) == reference(theirs, user(text) * 4)


def test_private_use_characters_in_messages_are_kept(pairs):
    ours, theirs = pairs["smollm"]
    strange = "\U000f0000\U000f0001\ue000 \U00100000.1\U00100001"
    assert ours.encode_chat(user(strange)) == reference(theirs, user(strange))
    assert strange + "<|im_end|>" in ours.decode(ours.encode_chat(user(strange + "<|im_end|>")))


def test_gemma_folds_system_messages_and_refuses_with_its_own_reason(pairs):
    """A1-05, A1-07."""
    ours, theirs = pairs["gemma3"]
    folded = [{"role": "system", "content": "S"}, *user("u")]
    assert ours.encode_chat(folded) == reference(theirs, folded)
    assert ours.encode_chat([*AGENT[:2]]).count(ours.bos_id) == 1
    for bad in (user("a") * 2, [{"role": "assistant", "content": "a"}, *user("b")]):
        with pytest.raises(PshareError, match="roles must alternate"):
            ours.encode_chat(bad)


def test_several_system_messages_are_each_rendered_once(pairs):
    """A1-08: the template decides where they go; none is lost silently."""
    for family in ("llama", "smollm", "qwen3"):
        ours, theirs = pairs[family]
        systems = [{"role": "system", "content": "MARKA"}, {"role": "system", "content": "MARKB"}]
        for messages in ([*systems, *user("x")], [*user("x"), systems[1], systems[0], *user("y")]):
            ids = ours.encode_chat(messages)
            assert ids == reference(theirs, messages)
            text = ours.decode(ids)
            assert text.count("MARKA") == text.count("MARKB") == 1


def test_missing_content_becomes_empty_text_if_the_template_needs_it(root, tmp_path):
    """A1-05: templates that concatenate the content of a tool call's message."""
    source = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}{% if m.content is defined %}!{% endif %}"
        "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
    )
    ours, _ = with_template(root, tmp_path, "llama", source)
    assert (
        ours.decode(ours.encode_chat(AGENT[1:3]))
        == f"user:Weather?!assistant:!{json.dumps([CALL], ensure_ascii=False)}"
    )
    careful, theirs = with_template(root, tmp_path, "llama", source.replace("m.content }}", "(m.content or '-') }}"))
    assert careful.encode_chat(AGENT[1:3]) == reference(theirs, AGENT[1:3])


def test_named_templates_and_files(root, tmp_path):
    named = [
        {"name": "default", "template": "D{{ messages[0].content }}{{ eos_token }}"},
        {
            "name": "tool_use",
            "template": "T{{ tools | tojson }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
        },
    ]
    ours, theirs = with_template(root, tmp_path, "llama", named)
    assert ours.chat_template == named[0]["template"]
    assert ours.encode_chat(user("x")) == reference(theirs, user("x"))
    assert ours.encode_chat(user("x"), tools=TOOLS) == reference(theirs, user("x"), tools=TOOLS)
    ours.save(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert reference(again, user("x"), tools=TOOLS) == ours.encode_chat(user("x"), tools=TOOLS)
    (tmp_path / "chat_template.jinja").write_text("  {%- if true %}\n J{{ messages[0].content }}\n  {% endif %}\n")
    assert Tokenizer.from_folder(tmp_path).encode_chat(user("x")) == reference(
        AutoTokenizer.from_pretrained(tmp_path), user("x")
    )


def test_qwen3_prompts_extend_turn_by_turn_up_to_the_think_block(pairs):
    """A2-22, A5-19: each turn renders as in transformers, and is a prefix of the next except with thinking off."""
    ours, theirs = pairs["qwen3"]
    chat = [
        message for turn in range(4) for message in (*user(f"q{turn}"), {"role": "assistant", "content": f"a{turn}"})
    ]

    def kept(earlier, later) -> bool:
        return later[: len(earlier)] == earlier

    for thinking, extends in ((None, True), (True, True), (False, False)):
        kwargs = {} if thinking is None else {"enable_thinking": thinking}
        prompts = [ours.encode_chat(chat[: 2 * turn + 1], template_kwargs=kwargs) for turn in range(4)]
        for turn, prompt in enumerate(prompts):
            assert prompt == reference(theirs, chat[: 2 * turn + 1], **kwargs)
        assert all(kept(a, b) for a, b in pairwise(prompts)) is extends
    # With thinking off the empty think block is in the prompt only: prompts differ from there on.
    think = ours.encode("<think>")[0]
    shared = prompts[0].index(think)
    assert prompts[1][:shared] == prompts[0][:shared]
    assert prompts[1][shared] != think
    thoughtful = [*user("q"), {"role": "assistant", "content": "<think>\nhm\n</think>\n\na"}, *user("r")]
    assert "hm" not in ours.decode(ours.encode_chat(thoughtful))
    assert "hm" in ours.decode(ours.encode_chat(thoughtful[:2], add_generation_prompt=False))
