"""Records and files of data sets that people have: the ids of the hand-made twin, or a sentence with the key to set."""

import csv
import gzip
import json
from pathlib import Path
from typing import get_args

import pytest
from fake_hub import FakeHub, run_on_hub
from training_data import chat, tokenizers, write_jsonl

from pshare_jax.errors import PshareError
from pshare_jax.training.data.config import DataConfig, ShapeName, SourceConfig
from pshare_jax.training.data.files import Broken, read_file
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.data.shapes import SHAPES

pytestmark = pytest.mark.host

CALL = {"name": "weather", "arguments": {"city": "Bern", "days": 3}}
CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call00000", "type": "function", "function": CALL}],
}
XLAM_TOOL = {
    "name": "weather",
    "description": "Forecast.",
    "parameters": {
        "city": {"description": "Where", "type": "str"},
        "days": {"description": "How long", "type": "int, optional", "default": 1},
        "hours": {"description": "When", "type": "List[int]"},
    },
}
OPENAI_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Forecast.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"description": "Where", "type": "string"},
                "days": {"description": "How long", "type": "integer", "default": 1},
                "hours": {"description": "When", "type": "array"},
            },
            "required": ["city", "hours"],
        },
    },
}
# (shape, a record as the data set has it, the record that it should be)
TWINS = [
    ("alpaca", {"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"messages": chat("Add.\n\n1 and 2", "3")}),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Yo"}, {"messages": chat("Hi", "Yo")}),
    (
        "dolly",
        {"instruction": "Who?", "context": "I am B.", "response": "B"},
        {"messages": chat("Who?\n\nI am B.", "B")},
    ),
    (
        "sharegpt",
        {"system": "short", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": chat("a", "b", system="short")},
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "weather?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "Sunny."},
            ],
            "tools": json.dumps([OPENAI_TOOL]),
        },
        {
            "messages": [
                {"role": "user", "content": "weather?"},
                CALLING,
                {"role": "tool", "content": "sun"},
                {"role": "assistant", "content": "Sunny."},
            ],
            "tools": [OPENAI_TOOL],
        },
    ),
    (
        "xlam",
        {"id": 0, "query": "weather?", "answers": json.dumps([CALL]), "tools": json.dumps([XLAM_TOOL])},
        {"messages": [{"role": "user", "content": "weather?"}, CALLING], "tools": [OPENAI_TOOL]},
    ),
    ("metamath", {"query": "1+1?", "response": "2", "type": "GSM"}, {"messages": chat("1+1?", "2")}),
    (
        "openorca",
        {"id": "x", "system_prompt": "Be kind.", "question": "q", "response": "r"},
        {"messages": chat("q", "r", system="Be kind.")},
    ),
    ("openorca", {"system_prompt": "", "question": "q", "response": "r"}, {"messages": chat("q", "r")}),
    ("question_answer", {"question": "q", "answer": "a"}, {"messages": chat("q", "a")}),
    ("prompt_response", {"prompt": "q", "response": "a"}, {"messages": chat("q", "a")}),
    ("input_output", {"input": "q", "output": "a"}, {"messages": chat("q", "a")}),
    ("preference", {"prompt": "q", "chosen": "good", "rejected": "bad"}, {"messages": chat("q", "good")}),
    (
        "preference",
        {"chosen": chat("q", "good"), "rejected": chat("q", "bad"), "score": 1},
        {"messages": chat("q", "good")},
    ),
]
PAIR = {"prompt": "question", "completion": "answer"}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizers(tmp_path_factory.mktemp("tokenizers"))["llama"]


def samples(tok, source: SourceConfig) -> list:
    found = prepare(DataConfig([source]), tok, tok.eos_ids)
    return [(sample.ids, sample.turns) for sample in found.train.store]


def test_the_config_names_every_shape():
    assert set(get_args(ShapeName)) == set(SHAPES) == {shape for shape, *_ in TWINS}


@pytest.mark.parametrize(("shape", "record", "twin"), TWINS)
def test_a_shape_gives_the_ids_of_its_twin(tok, tmp_path, shape, record, twin):
    theirs, ours = (write_jsonl(tmp_path / name, [line]) for name, line in (("a.jsonl", record), ("b.jsonl", twin)))
    found = samples(tok, SourceConfig(theirs, shape=shape))
    assert found == samples(tok, SourceConfig(ours))
    assert found


@pytest.mark.parametrize(("shape", "record"), [(shape, record) for shape, record, _ in TWINS])
def test_without_the_key_a_sentence_names_it(tok, tmp_path, shape, record):
    with pytest.raises(PshareError, match=rf"set shape: {shape} in this source"):
        samples(tok, SourceConfig(write_jsonl(tmp_path / "a.jsonl", [record])))


def as_text(value):
    """What CSV can hold."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def write_gzip(path: Path, record: dict) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def write_csv(path: Path, record: dict) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(record))
        writer.writeheader()
        writer.writerow({name: as_text(value) for name, value in record.items()})


def write_parquet(path: Path, record: dict) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist([record]), path)


def write_arrow(path: Path, record: dict) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist([record])
    with arrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {".jsonl.gz": write_gzip, ".csv": write_csv, ".parquet": write_parquet, ".arrow": write_arrow}


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize(("shape", "record", "twin"), TWINS)
def test_a_shape_gives_the_same_ids_from_every_kind_of_file(tok, tmp_path, ending, shape, record, twin):
    """Tables have a null for each missing field, CSV has texts only; without the key the sentence names it too."""
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, record)
    want = samples(tok, SourceConfig(write_jsonl(tmp_path / "b.jsonl", [twin])))
    assert samples(tok, SourceConfig(str(path), shape=shape)) == want
    with pytest.raises(PshareError, match=rf"set shape: {shape} in this source"):
        samples(tok, SourceConfig(str(path)))


PREPARE = """
import json, sys
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.data.prepare import prepare
tok = Tokenizer.from_folder(sys.argv[1])
for source in sys.argv[2:]:
    path, shape = source.split("=", 1)[::-1]
    found = prepare(DataConfig([SourceConfig(path, shape=shape)]), tok, tok.eos_ids)
    print(json.dumps([[sample.ids, sample.turns] for sample in found.train.store]))
"""


def test_a_shape_gives_the_same_ids_from_the_hub(tok, tmp_path):
    """All shapes from a local stand-in for the hub."""
    repositories, sources, want = {}, [], []
    for number, (shape, record, twin) in enumerate(TWINS):
        write_parquet(tmp_path / "a.parquet", record)
        files = {"data/train-00000-of-00001.parquet": (tmp_path / "a.parquet").read_bytes()}
        repositories[f"org/set{number}"] = {"main": files}
        sources.append(f"{shape}=hf:org/set{number}?split=train")
        found = samples(tok, SourceConfig(write_jsonl(tmp_path / "b.jsonl", [twin])))
        want.append([[list(ids), [list(turn) for turn in turns]] for ids, turns in found])
    tok.save(tmp_path / "tokenizer")
    with FakeHub(repositories) as hub:
        assert run_on_hub(hub, tmp_path / "home", PREPARE, str(tmp_path / "tokenizer"), *sources) == want


def test_roles_of_other_names(tok, tmp_path):
    """Case N4-01: human and gpt, User and Assistant, under messages: the sentence says what to set, and then they are read."""
    want = samples(tok, SourceConfig(write_jsonl(tmp_path / "b.jsonl", [{"messages": chat("q", "a")}])))
    for names in (("human", "gpt"), ("User", "Assistant")):
        messages = [{"role": role, "content": text} for role, text in zip(names, "qa", strict=True)]
        path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
        with pytest.raises(PshareError, match=r"shape: sharegpt, columns: \{conversations: messages\}"):
            samples(tok, SourceConfig(path))
        found = samples(tok, SourceConfig(path, shape="sharegpt", columns={"conversations": "messages"}))
        assert found == want


def test_messages_and_tools_as_json_text(tok, tmp_path):
    """Case N4-04, and N1-02: arguments as text inside messages as text."""
    called = {
        **CALLING,
        "tool_calls": [{"type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}],
    }
    whole = {"messages": [{"role": "user", "content": "q"}, CALLING], "tools": [OPENAI_TOOL]}
    as_json = {"messages": json.dumps([{"role": "user", "content": "q"}, called]), "tools": json.dumps([OPENAI_TOOL])}
    want = samples(tok, SourceConfig(write_jsonl(tmp_path / "b.jsonl", [whole])))
    for ending, write in WRITERS.items():
        write(tmp_path / f"a{ending}", as_json)
        assert samples(tok, SourceConfig(str(tmp_path / f"a{ending}"))) == want, ending


def test_columns_rename_fields(tok, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"ask": "q", "say": "a", "prompt": "not this"}])
    want = samples(tok, SourceConfig(write_jsonl(tmp_path / "b.jsonl", [{"messages": chat("q", "a")}])))
    assert samples(tok, SourceConfig(path, columns={"prompt": "ask", "completion": "say"})) == want
    assert samples(tok, SourceConfig(path, shape="metamath", columns={"query": "ask", "response": "say"})) == want
    with pytest.raises(PshareError, match=r"no field 'asked'; it has ask, say, prompt"):
        samples(tok, SourceConfig(path, columns={"prompt": "asked", "completion": "say"}))
    with pytest.raises(PshareError, match=r"set columns in this source"):
        samples(tok, SourceConfig(path))
    with pytest.raises(PshareError, match=r"shape alpaca needs instruction and output; this has ask, say, prompt"):
        samples(tok, SourceConfig(path, shape="alpaca"))


def test_files_as_people_have_them(tok, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    text = json.dumps(PAIR) + "\n" + json.dumps({"prompt": "zwei\u2028", "completion": "ö"}, ensure_ascii=False) + "\n"
    records = [json.loads(line) for line in text.split("\n") if line]
    (tmp_path / "a.jsonl").write_text(text)
    want = samples(tok, SourceConfig(str(tmp_path / "a.jsonl")))
    assert len(want) == 2
    (tmp_path / "b.JSONL").write_text(text)
    (tmp_path / "b.ndjson").write_text(text)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(text)
    for encoding in ("utf-16", "utf-16-be", "utf-32", "utf-8-sig"):
        marked = "\ufeff" + text if encoding == "utf-16-be" else text
        (tmp_path / f"{encoding}.jsonl").write_bytes(marked.encode(encoding))
    (tmp_path / "crlf.jsonl").write_bytes(text.replace("\n", "\r\n").encode())
    for name in ("data", "train"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"version": 1, name: records}, indent=1))
    (tmp_path / "list.json").write_text(json.dumps(records))
    with gzip.open(tmp_path / "list.json.gz", "wt") as file:
        file.write("\ufeff" + json.dumps(records, indent=2))
    rows = [["prompt", "completion"], *[list(record.values()) for record in records]]
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(
            "".join(f'"{mark.join(row).replace(mark, chr(34) + mark + chr(34))}"\n' for row in rows)
        )
    table = arrow.Table.from_pylist(records)
    for name, make in (("stream.arrow", arrow.ipc.new_stream), ("file.arrow", arrow.ipc.new_file)):
        with make(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    others = sorted(path for path in tmp_path.iterdir() if path.name != "a.jsonl")
    assert len(others) == 16
    for path in others:
        assert samples(tok, SourceConfig(str(path))) == want, path.name


def test_a_single_object_is_one_record(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"conversations": [{"from": "human", "value": "a"}]}, indent=1))
    assert [record for _, record in read_file(tmp_path / "one.json")] == [
        {"conversations": [{"from": "human", "value": "a"}]}
    ]


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode() * 99)[:-20])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "c.csv").write_bytes(b'prompt,completion\n"a,b\n')
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xfea")
    (tmp_path / "e.arrow").write_bytes(b"no arrow")
    (tmp_path / "f.xlsx").write_bytes(b"")
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.csv", "d.jsonl", "e.arrow", "f.xlsx"):
        with pytest.raises(PshareError, match=name.replace(".", r"\.")):
            list(read_file(tmp_path / name))
    (tmp_path / "g.csv").write_text("prompt,completion\na,b,c\nd,e\n")
    (_, first), (_, second) = read_file(tmp_path / "g.csv")
    assert isinstance(first, Broken)
    assert second == {"prompt": "d", "completion": "e"}
