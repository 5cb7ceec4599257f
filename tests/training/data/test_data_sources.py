"""Files and generated tasks: every record is read or reported, whatever the format."""

import json
import sys

import pytest
from training_data import chat, tokenizers, write_jsonl

from pshare_jax.errors import PshareError
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig
from pshare_jax.training.data.files import Broken
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.data.sources import open_reasoning_gym, read_source

pytestmark = pytest.mark.host

GOOD = {"messages": chat("question", "answer")}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizers(tmp_path_factory.mktemp("tokenizers"))["llama"]


def data(*paths, **kwargs) -> DataConfig:
    return DataConfig([SourceConfig(str(path)) for path in paths], **kwargs)


def prepared(tok, config):
    return prepare(config, tok, tok.eos_ids)


def ids(found) -> list:
    return [(sample.ids, sample.turns) for sample in found.train.store]


def test_every_line_is_counted(tok, tmp_path):
    """A5-18: BOM, CRLF, blank lines, no last newline, bad bytes, half surrogates, repeated keys, long lines, U+2028."""
    good = json.dumps(GOOD).encode()
    separator = json.dumps({"messages": chat("a\u2028b\x85c", "d\u2029e")}, ensure_ascii=False).encode()
    lines = [
        (b"\xef\xbb\xbf" + good, None),
        (good + b"\r", None),
        (b"", "blank"),
        (b"  \t", "blank"),
        (separator, None),
        (good.replace(b"question", b"caf\xe9"), "not UTF-8"),
        (good.replace(b"question", rb"\ud800"), "refused by the chat template"),
        (b'{"messages": []}', "no messages"),
        (good.replace(b'"role": "user", ', b""), "no role"),
        (good.replace(b'"answer"', b"null"), "empty answer"),
        (b'{"messages": 1, ' + good[1:], "repeated key"),
        (good.replace(b'"content"', b'"content": "", "content"', 1), "repeated key"),
        (b'{"unused": "' + b"q" * 10_000_000 + b'", ' + good[1:], None),
        (good.replace(b"question", b"q" * 10_000), "too long"),
        (good[:-1], "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (good.replace(b'"question"', b"NaN"), "broken JSON"),
        (good + good, "broken JSON"),
        (b"7", "not an object"),
        (good, None),
    ]
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines))
    found = prepared(tok, data(path, max_len=100))
    [report] = found.report.sources
    assert report.read == report.kept + sum(reason.count for reason in report.dropped.values())
    assert report.read == sum(reason != "blank" for _, reason in lines)
    want: dict[str, list[int]] = {}
    for number, (_, reason) in enumerate(lines, start=1):
        if reason not in (None, "blank"):
            want.setdefault(reason, []).append(number)
    assert {name: reason.lines for name, reason in report.dropped.items()} == want
    assert [sample.line for sample in found.train.store] == [i for i, (_, r) in enumerate(lines, start=1) if r is None]
    assert "d\u2029e" in tok.decode(found.train.store[2].ids)
    assert "'messages'" in report.dropped["repeated key"].detail
    assert f"column {len(good[:-1]) + 1}" in report.dropped["broken JSON"].detail
    assert f"byte {good.index(b'question') + 4} is 0xe9" in report.dropped["not UTF-8"].detail
    assert "2 x repeated key (lines 11, 12)" in str(report)


def test_json_parquet_and_jsonl_are_the_same(tok, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Z"}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"day": 3}}}
    records = [
        {"messages": [*chat("one"), {"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "f"}]},
        {"messages": [*chat("two"), {"role": "assistant", "tool_calls": [other]}, {"role": "tool", "content": "x"}]},
        GOOD,
        {"messages": chat("ü\u2028", "ö", system="s")},
    ]
    for record in records:
        record.setdefault("tools", None)
    write_jsonl(tmp_path / "a.jsonl", records)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(records, indent=1), encoding="utf-8")
    write_jsonl(tmp_path / "lines.json", records)
    parquet.write_table(arrow.Table.from_pylist(records), tmp_path / "a.parquet")
    want = ids(prepared(tok, data(tmp_path / "a.jsonl")))
    assert len(want) == 4
    for name in ("a.json", "lines.json", "a.parquet"):
        found = prepared(tok, data(tmp_path / name))
        assert ids(found) == want
        assert [sample.line for sample in found.train.store] == [1, 2, 3, 4]
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(PshareError, match=r"bad\.parquet"):
        list(read_source(str(tmp_path / "bad.parquet")))


def test_a_faulty_element_of_json_does_not_affect_the_others(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": {"b": [{"c": 1, "c": 2}]}}, {"a": 1, "a": 2}, 3]')
    contents = [record.content for record in read_source(str(path))]
    assert contents[0] == {"a": 1}
    for content, key in ((contents[1], "'c'"), (contents[2], "'a'")):
        assert isinstance(content, Broken)
        assert content.reason == "repeated key"
        assert key in content.detail
    assert contents[3] == 3
    path.write_text('[{"a": 1},\n {"a": 2')
    with pytest.raises(PshareError, match=r"a\.json .* line 2"):
        list(read_source(str(path)))


def test_the_order_of_globs_lists_and_sources(tok, tmp_path):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": chat(name, f"{name}{index}")} for index in range(2)])
    found = prepared(tok, data(tmp_path / "*.jsonl"))
    assert [report.name[-7:] for report in found.report.sources] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    listed = DataConfig(
        [SourceConfig([str(tmp_path / "c.jsonl"), str(tmp_path / "a.jsonl")]), SourceConfig(str(tmp_path / "b.jsonl"))]
    )
    found = prepared(tok, listed)
    assert [group.tolist() for group in found.train.members] == [[0, 1, 2, 3], [4, 5]]
    assert [(sample.source[-7:], sample.line) for sample in found.train.store] == [
        (f"{name}.jsonl", line) for name in "cab" for line in (1, 2)
    ]


def test_unusable_files_are_refused_by_name(tok, tmp_path):
    (tmp_path / "data.xlsx").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    write_jsonl(tmp_path / "good.jsonl", [GOOD])
    write_jsonl(tmp_path / "useless.jsonl", [{"messages": chat("x")}, {"text": "y"}, {"messages": chat("z")}])
    for name, reason in (
        ("none.jsonl", r"none\.jsonl"),
        ("*.txt", r"\*\.txt"),
        ("", r"folder.*\*\.jsonl"),
        ("data.xlsx", r"data\.xlsx.*\.parquet"),
        ("empty.jsonl", r"empty\.jsonl"),
        ("useless.jsonl", r"3 records of .*useless\.jsonl .* no assistant turn \(lines 1, 3\)"),
        ("*.jsonl", r"3 records of .*useless\.jsonl"),
    ):
        with pytest.raises(PshareError, match=reason):
            prepared(tok, data(tmp_path / "good.jsonl", f"{tmp_path}/{name}"))


def test_too_long_prompts_are_counted_and_refused_if_nothing_else_is_left(tok, tmp_path):
    """A5-05."""
    records = [{"messages": chat("q" * (10 if index % 5 < 2 else 300), "a")} for index in range(10)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    for config in (data(path, max_len=100), data(path, batch=RowsConfig(context_len=100))):
        found = prepared(tok, config)
        assert len(found.train) == 4
        assert "6 x too long (lines 3, 4, 5, 8, 9, ...)" in str(found.report)
    with pytest.raises(PshareError, match=r"10 records of .*a\.jsonl .* too long \(lines 1, 2"):
        prepared(tok, data(path, max_len=12))


def test_formats(tok, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "one", "completion": " two"}])
    [as_chat], [as_text] = (list(prepared(tok, data(path, format=form)).train.store) for form in (None, "text"))
    assert as_text.ids == (*tok.encode("one two"), tok.eos_id)
    assert list(as_chat.ids[: as_chat.turns[0][0]]) == tok.encode_chat(chat("one"))
    plain = type(tok)(tok._backend, tok._config, {})
    assert ids(prepared(plain, data(path))) == [(as_text.ids, as_text.turns)]
    with pytest.raises(PshareError, match=r"data\.format"):
        prepared(plain, data(path, format="chat"))


def test_answers_that_do_not_stop_the_model_are_reported(tok, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    records = [GOOD, {"messages": [*chat("x"), {"role": "assistant", "tool_calls": [call]}]}]
    config = data(write_jsonl(tmp_path / "a.jsonl", records))
    [report] = prepared(tok, config).report.sources
    assert (report.unstopped.count, report.unstopped.lines) == (1, [2])
    assert "does not stop" in str(report)
    stops = tok.eos_ids | set(tok.encode("<|eom_id|>", add_special_tokens=False))
    assert "does not stop" not in str(prepare(config, tok, stops).report)


# --- reasoning-gym ---------------------------------------------------------------------------------------------------

LEGS = "reasoning_gym:leg_counting?seed=7&size=20&max_animals=4"


def test_reasoning_gym_is_deterministic_and_accepts_its_own_answers(tok):
    pytest.importorskip("reasoning_gym")
    one, two = (list(read_source(LEGS)) for _ in range(2))
    assert one == two
    assert len(one) == 20
    assert list(read_source(LEGS.replace("seed=7", "seed=8"))) != one
    gym = open_reasoning_gym(LEGS)
    assert {len(gym[i]["metadata"]["animals"]) for i in range(20)} <= {3, 4}
    for sample in prepared(tok, data(LEGS)).train.store:
        item = gym[sample.line - 1]
        [(start, end)] = sample.turns
        assert gym.score_answer(tok.decode(sample.ids[start:end]), item) == 1.0
        assert list(sample.ids[:start]) == tok.encode_chat(chat(item["question"]))
        assert gym.score_answer("nothing", item) < 1.0


def test_reasoning_gym_settings():
    pytest.importorskip("reasoning_gym")
    for path, reason in (
        ("reasoning_gym:", "no task ''"),
        ("reasoning_gym:none", "no task 'none'"),
        ("reasoning_gym:leg_counting?seed", "key=value"),
        ("reasoning_gym:leg_counting?seed=1&seed=2", "each key once"),
        ("reasoning_gym:leg_counting?seed.a=1&seed=2", "each key once"),
        ("reasoning_gym:leg_counting?seed=1&seed.a=2", "seed"),
        ("reasoning_gym:leg_counting?size=0", "size"),
        ("reasoning_gym:leg_counting?size=x", "size"),
        ("reasoning_gym:leg_counting?legs=4", "legs"),
        ("reasoning_gym:leg_counting?min_animals=100", "animals"),
    ):
        with pytest.raises(PshareError, match=reason):
            list(read_source(path))


def test_missing_packages_are_named_with_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(PshareError, match="pip install reasoning-gym"):
        list(read_source(LEGS))
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(PshareError, match="pip install pyarrow"):
        list(read_source(str(tmp_path / "a.parquet")))
