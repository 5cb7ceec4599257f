"""Samples from records: prompts are encoded as in the server, and exactly the answers are trained."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_data import FAMILIES, NO_LIMITS, chat, tokenizers, with_template

from pshare_jax.errors import PshareError
from pshare_jax.training.data.records import Dropped, RecordReader
from pshare_jax.training.data.samples import Limits

pytestmark = pytest.mark.host

END = {"llama": "<|eot_id|>", "smollm": "<|im_end|>", "qwen3": "<|im_end|>", "gemma3": "<end_of_turn>"}
THINK = "<think>\n\n</think>\n\n"
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def toks(root):
    return tokenizers(root)


def reader(tokenizer, limits=NO_LIMITS, is_chat=True, stops=None):
    return RecordReader(tokenizer, tokenizer.eos_ids if stops is None else stops, is_chat, limits)


def samples_of(tokenizer, record, **kwargs):
    return reader(tokenizer, **kwargs).samples(record, "a.jsonl", 7)[0]


def turns_of(samples):
    """(prompt ids, answer ids) of every turn, in order."""
    return [(list(s.ids[:start]), list(s.ids[start:end])) for s in samples for start, end in s.turns]


def answers(tokenizer, samples):
    return [tokenizer.decode(answer, skip_special_tokens=False) for _, answer in turns_of(samples)]


def check_samples(tokenizer, samples, messages, **kwargs):
    """Every prompt is the server's, ranges are well-formed, and nothing follows the last answer."""
    trained = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert [prompt for prompt, _ in turns_of(samples)] == [
        tokenizer.encode_chat(messages[:index], **kwargs) for index in trained
    ]
    for sample in samples:
        ends = [0]
        for start, end in sample.turns:
            assert ends[-1] < start < end <= len(sample.ids)
            ends.append(end)
        assert ends[-1] == len(sample.ids)
        assert (sample.source, sample.line) == ("a.jsonl", 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_turns_train_exactly_the_answers_and_their_ends(toks, family):
    """A5-01, A5-19."""
    tokenizer = toks[family]
    messages = chat("q one", "the first", "q two", "and 2", "q three", "is\nthird")
    samples = samples_of(tokenizer, {"messages": messages})
    lead = THINK if family == "qwen3" else ""
    assert answers(tokenizer, samples) == [f"{lead}{text}{END[family]}" for text in ("the first", "and 2", "is\nthird")]
    check_samples(tokenizer, samples, messages)
    # Qwen3 renders the think block of the last turn only.
    assert len(samples) == (3 if family == "qwen3" else 1)
    if family != "qwen3":
        whole = tokenizer.encode_chat(messages, add_generation_prompt=False)
        assert list(samples[0].ids) == whole[: len(samples[0].ids)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_equal_the_servers(toks, family):
    tokenizer = toks[family]
    pieces = [
        "a",
        " the",
        "\n",
        "\n\n\n",
        "  ",
        "é",
        "<think>",
        "</think>",
        END[family],
        "<|im_start|>",
        "<",
        "e\u0301",
    ]
    texts = st.lists(st.sampled_from(pieces), max_size=5).map("".join)
    words = texts.map(lambda text: f"{text}w")

    @given(st.lists(st.tuples(texts, words), min_size=1, max_size=4), st.none() | texts)
    @settings(max_examples=60, deadline=None)
    def check(pairs, system):
        messages = chat(*(text for pair in pairs for text in pair), system=system)
        samples = samples_of(tokenizer, {"messages": messages})
        check_samples(tokenizer, samples, messages)
        end = tokenizer.encode(END[family], add_special_tokens=False)[0]
        for (_, answer), (_, text) in zip(turns_of(samples), pairs, strict=True):
            # The end of the turn is the only control token, and only at the end.
            assert [index for index in answer if index in tokenizer.special_ids] == [end]
            assert answer[-1] == end
            written = tokenizer.decode(answer, skip_special_tokens=False).removesuffix(END[family])
            shown = text.rpartition("</think>")[2].lstrip("\n") if family == "qwen3" else text
            shown = shown.strip() if family in ("llama", "gemma3") else shown
            shown = shown.replace("e\u0301", "é") if family == "qwen3" else shown
            assert written.endswith(shown)
            if family != "qwen3":
                assert written == shown

    check()


def test_no_token_spans_prompt_and_answer(toks):
    tokenizer = toks["smollm"]
    messages = chat("q", "\n\nhello", "r", "s")
    joint = tokenizer.encode_chat(messages[:2], add_generation_prompt=False)
    prompt = tokenizer.encode_chat(messages[:1])
    assert joint[: len(prompt)] != prompt
    samples = samples_of(tokenizer, {"messages": messages})
    check_samples(tokenizer, samples, messages)
    assert answers(tokenizer, samples) == ["\n\nhello<|im_end|>", "s<|im_end|>"]
    quoting = chat("q", "\n\nsay <|im_end|>")
    assert answers(tokenizer, samples_of(tokenizer, {"messages": quoting})) == ["\n\nsay <|im_end|><|im_end|>"]
    # History has the server's tokenization, so the second turn cannot continue the first.
    assert len(samples) == 2


def test_control_text_in_messages_stays_text(toks):
    for family in FAMILIES:
        tokenizer, end = toks[family], END[family]
        messages = chat(f"say {end} {end}", f"I say {end} twice {end}!", "again", "no")
        samples = samples_of(tokenizer, {"messages": messages})
        assert answers(tokenizer, samples)[0].endswith(f"I say {end} twice {end}!{end}")
        [(_, first), _] = turns_of(samples)
        assert sum(index in tokenizer.special_ids for index in first) == 1
        check_samples(tokenizer, samples, messages)


def test_qwen3_think_blocks(toks):
    tokenizer = toks["qwen3"]
    messages = chat("q", "<think>\nhm\n</think>\n\nfirst", "r", "second")
    record = {"messages": messages}
    assert answers(tokenizer, samples_of(tokenizer, record)) == [
        "<think>\nhm\n</think>\n\nfirst<|im_end|>",
        f"{THINK}second<|im_end|>",
    ]
    messages[1] = {"role": "assistant", "content": "first", "reasoning_content": "hm"}
    assert answers(tokenizer, samples_of(tokenizer, record))[0] == "<think>\nhm\n</think>\n\nfirst<|im_end|>"
    # With thinking off the empty block is part of the prompt and not trained.
    off = {"messages": chat("q", "first", "r", "second"), "chat_template_kwargs": {"enable_thinking": False}}
    samples = samples_of(tokenizer, off)
    assert answers(tokenizer, samples) == ["first<|im_end|>", "second<|im_end|>"]
    check_samples(tokenizer, samples, off["messages"], template_kwargs=off["chat_template_kwargs"])
    with pytest.raises(Dropped, match="right after its prompt"):
        samples_of(tokenizer, {**off, "messages": messages})


def test_tool_turns(toks):
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
    ]
    want = {
        "llama": ['<|python_tag|>{"name": "weather", "parameters": {"city": "Zürich"}}<|eom_id|>', "Rain.<|eot_id|>"],
        "qwen3": [
            f'{THINK}<tool_call>\n{{"name": "weather", "arguments": {{"city": "Zürich"}}}}\n</tool_call><|im_end|>',
            f"{THINK}Rain.<|im_end|>",
        ],
    }
    for family, expected in want.items():
        samples = samples_of(toks[family], {"messages": messages, "tools": TOOLS})
        assert answers(toks[family], samples) == expected
        check_samples(toks[family], samples, messages, tools=TOOLS)
        as_text = samples_of(toks[family], {"messages": json.dumps(messages), "tools": json.dumps(TOOLS)})
        assert as_text == samples
    written = ['{"name": "weather", "parameters": {"city": "Zürich"}}<end_of_turn>', "Rain.<end_of_turn>"]
    samples = samples_of(toks["gemma3"], {"messages": messages, "tools": TOOLS})
    assert answers(toks["gemma3"], samples) == written
    assert '{"name": "weather"' in toks["gemma3"].decode(samples[0].ids[: samples[0].turns[0][0]])


def test_turns_can_be_excluded(toks):
    messages = chat("q", "one", "r", "two", "s", "three")
    for mark in ({"train": False}, {"weight": 0}, {"weight": 0.0}):
        marked = [*messages[:3], {**messages[3], **mark}, *messages[4:]]
        samples, left_out = reader(toks["llama"]).samples({"messages": marked}, "a", 1)
        assert answers(toks["llama"], samples) == ["one<|eot_id|>", "three<|eot_id|>"]
        assert left_out == {"excluded by train or weight": 1}
        assert list(samples[0].ids) == list(samples_of(toks["llama"], {"messages": messages})[0].ids)
    kept = [{**message, "train": True, "weight": 1} for message in messages]
    assert samples_of(toks["llama"], {"messages": kept}) == samples_of(toks["llama"], {"messages": messages})
    for bad in ({"train": "no"}, {"weight": 0.5}, {"weight": True}):
        with pytest.raises(Dropped, match="must be"):
            samples_of(toks["llama"], {"messages": [*messages[:3], {**messages[3], **bad}]})


def test_ends_of_turns(root, toks, tmp_path):
    """Templates that write eos only after the last turn, no end at all, or an end that is not a stop token."""
    turns = "{% for m in messages %}{{ m.role + ':' + m.content }}"
    cases = [
        (turns + "<|eot_id|>{% endfor %}{% if not add_generation_prompt %}<|end_of_text|>{% endif %}", "x<|eot_id|>"),
        (turns + "\n{% endfor %}", "assistant:x\n<|eot_id|>"),
        (turns + "<|eom_id|>\n{% endfor %}", "assistant:x<|eom_id|>"),
        (turns + "<|python_tag|>y{% endfor %}", "assistant:x<|python_tag|>y<|eot_id|>"),
    ]
    for template, expected in cases:
        if expected == "x<|eot_id|>":
            template += "{% if add_generation_prompt %}assistant:{% endif %}"
        tokenizer = with_template(root, tmp_path, "llama", template)
        stops = tokenizer.eos_ids | {tokenizer.encode("<|end_of_text|>", add_special_tokens=False)[0]}
        samples = samples_of(tokenizer, {"messages": chat("q", "x", "r", "x")}, stops=stops)
        assert answers(tokenizer, samples) == [expected] * 2
        check_samples(tokenizer, samples, chat("q", "x", "r", "x"))
    nothing = with_template(root, tmp_path, "llama", cases[1][0], eos_token=None)
    with pytest.raises(PshareError, match="eos_token"):
        samples_of(nothing, {"messages": chat("q", "x")})


def test_templates_that_change_history(root, tmp_path):
    """Templates whose history depends on later messages: a sample has the server's prompts, or the record is dropped."""
    for body in ("m.content | trim if not loop.last else m.content", "m.content ~ loop.revindex", "messages | length"):
        template = (
            "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ " + body + " }}<|eot_id|>"
            "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
        )
        tokenizer = with_template(root, tmp_path, "llama", template)
        messages = chat("q", "one ", "r", "two ")
        if "revindex" in body or "length" in body:
            with pytest.raises(Dropped, match=r"right after its prompt|does not show message 0, of role user"):
                samples_of(tokenizer, {"messages": messages})
            continue
        samples = samples_of(tokenizer, {"messages": messages})
        check_samples(tokenizer, samples, messages)
        assert len(samples) == 2
        assert answers(tokenizer, samples) == ["one <|eot_id|>", "two <|eot_id|>"]


def test_templates_with_the_date(root, tmp_path):
    template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
        "<|end_header_id|>{% endif %}"
    )
    tokenizer = with_template(root, tmp_path, "llama", template)
    messages = chat("q", "one", "r", "two")
    samples = samples_of(tokenizer, {"messages": messages})
    assert len(samples) == 1
    check_samples(tokenizer, samples, messages)


def test_prompt_and_completion_are_the_same_chat(toks):
    for family in FAMILIES:
        messages = chat("hello", "world", system="be kind")
        want = samples_of(toks[family], {"messages": messages})
        for completion in ("world", messages[-1:]):
            assert samples_of(toks[family], {"prompt": messages[:-1], "completion": completion}) == want
        assert samples_of(toks[family], {"prompt": "hello", "completion": "world"}) == samples_of(
            toks[family], {"messages": chat("hello", "world")}
        )
        # An answer inside the prompt is context.
        longer = {"prompt": chat("a", "b", "c"), "completion": "d"}
        assert [len(sample.turns) for sample in samples_of(toks[family], longer)] == [1]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_directly_follow_their_prompt(toks, family):
    tokenizer = toks[family]
    pieces = ["a", " the", " and", "\n", "\n\n", "    ", "é", END[family], "<|im_", "end|>"]
    texts = st.lists(st.sampled_from(pieces), min_size=1, max_size=5).map("".join)

    @given(texts, texts)
    @settings(max_examples=60, deadline=None)
    def check(prompt, completion):
        [sample] = samples_of(tokenizer, {"prompt": prompt, "completion": completion}, is_chat=False)
        [(start, end)] = sample.turns
        assert list(sample.ids[:start]) == tokenizer.encode(prompt)
        answer = sample.ids[start:end]
        assert answer[-1] == tokenizer.eos_id
        assert not set(answer[:-1]) & tokenizer.special_ids
        assert tokenizer.decode(answer[:-1]) == completion

    check()


def test_turns_within_the_limits_are_kept(toks):
    tokenizer = toks["smollm"]
    messages = chat("q", "one", "r", "two", "s", "three")
    [whole] = samples_of(tokenizer, {"messages": messages})
    for limits in (
        Limits(whole.turns[1][1]),
        Limits(100_000, context_len=whole.turns[1][0] - 1),
        Limits(whole.turns[2][1] - 1),
    ):
        [cut], left_out = reader(tokenizer, limits).samples({"messages": messages}, "a", 1)
        assert cut.turns == whole.turns[:2]
        assert cut.ids == whole.ids[: whole.turns[1][1]]
        assert left_out == {"too long": 1}
    sizes = [end - start for start, end in whole.turns]
    apart = samples_of(tokenizer, {"messages": messages}, limits=Limits(100_000, answer_len=sizes[0] + sizes[1]))
    assert [len(sample.turns) for sample in apart] == [2, 1]
    check_samples(tokenizer, apart, messages)
    with pytest.raises(Dropped, match="too long"):
        samples_of(tokenizer, {"messages": messages}, limits=Limits(whole.turns[0][1] - 1))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not an object"),
        ({}, "no messages"),
        ({"messages": []}, "no messages"),
        ({"prompt": "x"}, "no messages"),
        ({"messages": "x"}, "wrong type"),
        ({"messages": ["x"]}, "wrong type"),
        ({"messages": [{"content": "x"}]}, "no role"),
        ({"messages": [{"role": "root", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": chat("x")}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no message before the answer"),
        ({"messages": chat("x", " \n")}, "empty answer"),
        ({"messages": [*chat("x"), {"role": "assistant", "content": None}]}, "empty answer"),
        ({"messages": [*chat("x"), {"role": "assistant"}]}, "empty answer"),
        ({"messages": [*chat("x"), {"role": "assistant", "content": [{"type": "text", "text": ""}]}]}, "empty answer"),
        ({"messages": [*chat("x"), {"role": "assistant", "content": 3}]}, "refused by the chat template"),
        ({"messages": chat("\ud800", "x")}, "refused by the chat template"),
        (
            {"messages": [*chat("x"), {"role": "assistant", "content": "x", "train": False}]},
            "excluded by train or weight",
        ),
        ({"messages": chat("x", "y"), "tools": "{"}, "wrong type"),
        ({"messages": chat("x", "y"), "tools": {}}, "wrong type"),
        ({"prompt": 3, "completion": "x"}, "wrong type"),
        ({"prompt": "x", "completion": chat("x")}, "wrong type"),
        ({"prompt": "x", "completion": [3]}, "wrong type"),
    ],
)
def test_unusable_records_are_dropped_by_reason(toks, record, reason):
    with pytest.raises(Dropped) as dropped:
        samples_of(toks["llama"], record)
    assert dropped.value.reason == reason


def test_unusable_texts_are_dropped_by_reason(toks):
    for record, reason in (
        ({"messages": chat("x", "y", "z", "w")}, "more than a question"),
        ({"messages": chat("x", "y", system="z")}, "more than a question"),
        ({"text": "x"}, "no messages"),
        ({"messages": [*chat("x"), {"role": "assistant", "tool_calls": [CALL]}]}, "empty answer"),
        ({"prompt": "x", "completion": ""}, "empty answer"),
        ({"prompt": "", "completion": "x"}, "empty prompt"),
        ({"prompt": "x", "completion": "\ud800"}, "wrong text"),
    ):
        with pytest.raises(Dropped) as dropped:
            samples_of(toks["smollm"], record, is_chat=False)
        assert dropped.value.reason == reason
