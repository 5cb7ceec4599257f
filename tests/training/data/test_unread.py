"""No field of a record is lost in silence: what changes nothing is counted by name, and refused above a share."""

import re
from typing import Any

import pytest
from training_data import FAMILIES, NO_LIMITS, chat, tokenizers, with_template, write_jsonl

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tool_format import FORMATS
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.data.records import Dropped, RecordReader
from pshare_jax.training.data.report import MAX_LOST
from pshare_jax.training.data.shapes import SHAPES, shaped
from pshare_jax.training.data.unread import unread_fields

pytestmark = pytest.mark.host

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TALK = chat("q", "one", "r", "two", system="Be kind.")
CALLING = [
    *chat("weather?"),
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
    {"role": "assistant", "content": "Rain."},
]
TEMPLATES = {
    # No tools behind a system message, and no calls beside a text.
    "no tools behind system": "{% for m in messages %}<|im_start|>{{ m.role + ':' + m.content }}"
    "{% if loop.first and m.role == 'user' and tools %}{{ tools | tojson }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}",
    "names": "{% for m in messages %}<|im_start|>{{ m.role + (m.name or '') + ':' + m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}",
}


def with_fields(messages: list[dict], role: str, **fields: Any) -> list[dict]:
    return [{**message, **fields} if message["role"] == role else message for message in messages]


RECORDS = {
    "tools": {"messages": TALK, "tools": TOOLS},
    "tools without system": {"messages": TALK[1:], "tools": TOOLS},
    "calls": {"messages": CALLING, "tools": TOOLS},
    "name": {"messages": with_fields(TALK, "user", name="bob")},
    "thoughts": {"messages": with_fields(TALK, "assistant", reasoning_content="hm")},
    "last thought": {"messages": [*TALK[:-1], {**TALK[-1], "reasoning": "hm"}]},
    "thoughts of the past": {
        "prompt": with_fields(TALK[:-1], "assistant", thinking="hm"),
        "completion": "two",
    },
    "other fields": {"messages": with_fields(TALK, "user", time=3, cited=[], flag=False)},
    "an excluded turn": {"messages": [{**m, "train": False, "x": 1} if m["content"] == "one" else m for m in TALK]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def toks(root):
    made = tokenizers(root)
    for number, (name, template) in enumerate(TEMPLATES.items()):
        (root / str(number)).mkdir()
        made[name] = with_template(root, root / str(number), "smollm", template)
    return made


def reader(tok, style: ChatStyle | None = None, is_chat: bool = True) -> RecordReader:
    return RecordReader(tok, tok.eos_ids, is_chat, NO_LIMITS, style)


def lost(read: RecordReader, record: dict, **source: Any) -> list[str]:
    config = SourceConfig("a", **source)
    return unread_fields(record, shaped(record, config.shape, config.columns), config, read).lost


def ids(read: RecordReader, record: dict) -> list | None:
    try:
        return [(sample.ids, sample.turns) for sample in read.samples(record, "a", 1)[0]]
    except Dropped:
        return None


def removals(record: dict) -> dict[str, dict]:
    """The record without each of its optional fields."""
    made = {}
    if "tools" in record:
        made["tools"] = {name: value for name, value in record.items() if name != "tools"}
    lists = [name for name in ("messages", "prompt") if name in record]
    for key in lists:
        optional = {name for message in record[key] for name in message} - {"role", "content", "train"}
        for name in optional - {"tool_call_id"}:
            linked = [m for m in record[key] if name in m and not (name == "name" and m["role"] == "tool")]
            cut = [{k: v for k, v in m.items() if k != name} if m in linked else m for m in record[key]]
            if any(m[name] not in (None, [], "") for m in linked):
                made[f"messages.{name}"] = {**record, key: cut}
    return made


@pytest.mark.parametrize("style", [None, ChatStyle(FORMATS["json_list"]), ChatStyle(FORMATS["hermes"], "last")])
@pytest.mark.parametrize("family", [*FAMILIES, *TEMPLATES])
def test_a_field_is_lost_if_its_removal_leaves_the_ids(toks, family, style):
    read = reader(toks[family], style)
    some = 0
    for name, record in RECORDS.items():
        whole = ids(read, record)
        if whole is None:
            continue
        want = {field for field, cut in removals(record).items() if ids(read, cut) == whole}
        assert set(lost(read, record)) == want, name
        some += len(want)
    assert some


def test_what_the_templates_of_the_tests_leave_out(toks):
    """So that the property above is about something."""
    plain = {name: [lost(reader(toks[family]), RECORDS[name]) for family in toks] for name in RECORDS}
    assert plain["tools"] == [[], [], [], [], ["tools"], []]
    assert plain["tools without system"] == [[]] * 6
    assert plain["name"] == [["messages.name"]] * 5 + [[]]
    assert plain["last thought"] == [["messages.reasoning"]] * 2 + [[]] + [["messages.reasoning"]] * 3
    styled = reader(toks["no tools behind system"], ChatStyle(FORMATS["hermes"]))
    assert lost(styled, RECORDS["tools"]) == []


def test_template_variables(toks):
    """A variable that the template reads is none that is lost, whatever its value changes."""
    for value in (True, False):
        record = {"messages": TALK, "chat_template_kwargs": {"enable_thinking": value, "mood": "x"}}
        assert lost(reader(toks["qwen3"]), record) == ["chat_template_kwargs.mood"]
        names = ["chat_template_kwargs.enable_thinking", "chat_template_kwargs.mood"]
        assert lost(reader(toks["llama"]), record) == names
        assert lost(reader(toks["llama"]), record, ignore=[names[1]]) == names[:1]


def test_fields_beside_the_messages(toks):
    read = reader(toks["llama"])
    record = {"messages": TALK, "id": 3, "prompt": "q", "system": "Be rude.", "images": [], "documents": None}
    found = unread_fields(record, record, SourceConfig("a"), read)
    assert found == (["system"], ["id", "prompt"])
    pair = {"prompt": "q", "completion": "a", "functions": TOOLS, "score": 1}
    assert unread_fields(pair, pair, SourceConfig("a", ignore=["score"]), read) == (["functions"], [])
    assert unread_fields(pair, pair, SourceConfig("a", ignore=["*"]), read) == ([], [])
    columns = {"ask": "q", "say": "a", "prompt": "unused", "system": "x"}
    config = SourceConfig("a", columns={"prompt": "ask", "completion": "say"})
    assert unread_fields(columns, {"prompt": "q", "completion": "a"}, config, read) == (["system"], [])


def test_texts_have_a_prompt_and_an_answer_only(toks):
    read = reader(toks["llama"], is_chat=False)
    record = {"prompt": "q", "completion": "a", "tools": TOOLS, "chat_template_kwargs": {"x": 1}, "id": 1}
    assert lost(read, record) == ["tools", "chat_template_kwargs"]
    assert lost(read, {"messages": with_fields(chat("q", "a"), "user", name="bob")}) == ["messages.name"]


MEANT = {"system": "Be kind.", "tools": TOOLS, "input": "in", "context": "with", "prompt": "asked"}
SHAPED = {
    "alpaca": {"instruction": "q", "output": "a"},
    "dolly": {"instruction": "q", "response": "a"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "xlam": {"query": "q", "tools": [], "answers": [{"name": "f", "arguments": {}}]},
    "metamath": {"query": "q", "response": "a"},
    "openorca": {"system_prompt": "s", "question": "q", "response": "a"},
    "question_answer": {"question": "q", "answer": "a"},
    "prompt_response": {"prompt": "q", "response": "a"},
    "input_output": {"input": "q", "output": "a"},
    "preference": {"chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_says_what_it_reads(toks, shape):
    """Found by removal of each field that some shape reads."""
    for name, value in MEANT.items():
        if name in SHAPED[shape]:
            continue
        record = {**SHAPED[shape], name: value}
        read = shaped(record, shape, {}) != shaped(SHAPED[shape], shape, {})
        assert (name in SHAPES[shape].maybe) is read
        if ids(reader(toks["llama"]), shaped(record, shape, {})) and name in ("system", "tools"):
            assert lost(reader(toks["llama"]), record, shape=shape) == ([] if read else [name])


# --- the refusal -----------------------------------------------------------------------------------------------------


def prepared(tok, tmp_path, records: list[dict], **source: Any):
    path = write_jsonl(tmp_path / "a.jsonl", records)
    return prepare(DataConfig([SourceConfig(path, **source)]), tok, tok.eos_ids)


def test_up_to_a_share_lost_fields_are_counted(toks, tmp_path):
    good = {"messages": TALK[1:], "id": 7}
    odd = {"messages": with_fields(TALK[1:], "user", name="bob"), "id": 8}
    assert MAX_LOST == 0.01
    found = prepared(toks["llama"], tmp_path, [good] * 198 + [odd] * 2)
    [report] = found.report.sources
    assert report.lost["messages.name"].lines == [199, 200]
    assert "without effect: 2 x messages.name (lines 199, 200)" in str(report)
    assert "fields that are not read: id (200)" in str(report)
    with pytest.raises(PshareError, match=r"messages\.name \(3, 1\.5%\)"):
        prepared(toks["llama"], tmp_path, [good] * 197 + [odd] * 3)


@pytest.mark.parametrize(
    ("family", "record", "words"),
    [
        ("no tools behind system", RECORDS["tools"], r"tools \(9, 100\.0%\); set module\.tool_format, or"),
        ("llama", RECORDS["name"], r"messages\.name .*give a template .* module\.chat_template"),
        ("llama", {"messages": TALK, "system": "x"}, r"system .*; set a shape or columns"),
        ("llama", {"messages": TALK, "chat_template_kwargs": {"mood": 1}}, r"chat_template_kwargs\.mood"),
    ],
)
def test_the_refusal_names_field_count_share_and_what_to_set(toks, tmp_path, family, record, words):
    with pytest.raises(PshareError, match=words) as refused:
        prepared(toks[family], tmp_path, [record] * 9)
    message = str(refused.value)
    assert "\n" not in message
    assert "a.jsonl" in message
    ignore = re.search(r"ignore: \[(.*)\]", message)
    assert ignore is not None
    found = prepared(toks[family], tmp_path, [record] * 9, ignore=ignore[1].split(", "))
    assert len(found.train) == 9
    assert found.report.sources[0].lost == {}


def test_faulty_records_are_dropped_before(toks, tmp_path):
    """A record that cannot be used does not count."""
    odd = {"messages": TALK, "system": "x", "tools": "{"}
    found = prepared(toks["llama"], tmp_path, [odd, {"messages": TALK}])
    assert found.report.sources[0].lost == {}
