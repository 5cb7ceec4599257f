"""The cache of prepared data: what hits and misses, damaged sets, leftovers of killed processes, and worker processes."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from training_data import chat, tokenizers, with_template, write_jsonl

import pshare_jax.training.data.rendering as rendering
from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.training.data import cache
from pshare_jax.training.data.cache import KEPT, PreparedSets, hold
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig
from pshare_jax.training.data.prepare import PreparedData, prepare
from pshare_jax.training.data.sources import read_source
from pshare_jax.training.processes import ordered_map

pytestmark = pytest.mark.host

LOOP = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def tok(root):
    return tokenizers(root)["llama"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test's own cache."""
    monkeypatch.setattr(cache, "data_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch):
    """The sources that were read."""
    paths = []

    def watched(path):
        paths.append(path)
        yield from read_source(path)

    monkeypatch.setattr(rendering, "read_source", watched)
    return paths


def records(count: int) -> list:
    """Conversations of one and two answers, some records broken, some answers too long."""
    good = [{"messages": chat(f"q{i}", f"a{i}", *([f"r{i}", "b " * (i % 40)] if i % 3 else []))} for i in range(count)]
    return [{"messages": 1} if index % 17 == 5 else record for index, record in enumerate(good)]


def config_of(*paths: str, **changes) -> DataConfig:
    return replace(DataConfig([SourceConfig(path) for path in paths], max_len=60, eval_fraction=0.2), **changes)


def content(data: PreparedData) -> tuple:
    """All that a run sees of its data."""
    sides = [
        [[data.train.store[int(index)] for index in group] for group in side.members]
        for side in (data.train, data.evaluation)
    ]
    return sides, data.train.weights, data.train.store.digest, data.report, str(data.report)


# --- hits and misses -------------------------------------------------------------------------------------------------


def test_data_are_prepared_once(tok, tmp_path, reads):
    paths = [write_jsonl(tmp_path / name, records(50)) for name in ("a.jsonl", "b.jsonl")]
    first = prepare(config_of(*paths), tok, tok.eos_ids)
    assert reads == paths
    again = prepare(config_of(*paths), tok, tok.eos_ids)
    assert reads == paths
    assert content(again) == content(first)
    assert again.report.sources[0].dropped
    assert again.report.sources[0].left_out
    # Neither affects a sample; the weight is the config's.
    other = replace(
        config_of(*paths), num_workers=2, epochs=None, sources=[SourceConfig(path, weight=2.0) for path in paths]
    )
    assert prepare(other, tok, tok.eos_ids).train.weights == (2.0, 2.0)
    assert (
        prepare(replace(other, batch=RowsConfig(rows=9)), tok, tok.eos_ids).train.store.digest
        == first.train.store.digest
    )
    assert reads == paths


def test_what_changes_a_sample_or_the_split_is_another_set(tok, root, tmp_path, reads, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", records(40))
    config = config_of(path)

    def misses(config=config, tokenizer=tok, stops=tok.eos_ids, **options) -> bool:
        before = len(reads)
        prepare(config, tokenizer, stops, **options)
        return len(reads) > before

    assert misses()
    assert not misses()
    for change in (
        {"max_len": 50},
        {"format": "chat", "batch": RowsConfig(context_len=50)},
        {"batch": RowsConfig(answer_len=20)},
        {"seed": 1},
        {"eval_fraction": 0.3},
        {"eval_fraction": 0.0},
        {"eval_fraction": 0.0, "eval_sources": [SourceConfig(path)]},
        {"sources": [SourceConfig([path, path])]},
        {"sources": [SourceConfig(path), SourceConfig(path)]},
        {"sources": [SourceConfig(path, columns={"messages": "messages"})]},
    ):
        assert misses(replace(config, **change)), change
    assert misses(replace(config, batch=RowsConfig(context_len=40)))
    assert misses(replace(config, batch=RowsConfig(context_len=40)), layout="one_stream")
    assert misses(stops=tok.eos_ids | {5})
    assert misses(vocab_size=tok.vocab_size)
    assert misses(style=ChatStyle(system="last"))
    assert misses(tokenizer=tokenizers(root)["smollm"])
    assert misses(tokenizer=with_template(root, tmp_path, "llama", LOOP))
    monkeypatch.setattr(cache, "_code_digest", lambda: "other code")
    assert misses()


def test_files_are_told_by_their_state(tok, tmp_path, reads):
    """Written anew with the same size, added to a glob, or replaced by another file under the old name and times."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"messages": chat("q", "a")}])
    config = replace(config_of(str(tmp_path / "*.jsonl")), eval_fraction=0.0)
    assert len(prepare(config, tok, tok.eos_ids).train) == 1
    state = path.stat()
    write_jsonl(path, [{"messages": chat("q", "b")}])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    prepare(config, tok, tok.eos_ids)
    assert len(reads) == 2
    write_jsonl(tmp_path / "new", [{"messages": chat("q", "c")}])
    os.utime(tmp_path / "new", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    (tmp_path / "new").rename(path)
    prepare(config, tok, tok.eos_ids)
    assert len(reads) == 3
    write_jsonl(tmp_path / "b.jsonl", [{"messages": chat("q", "d")}])
    assert len(prepare(config, tok, tok.eos_ids).train) == 2
    (tmp_path / "b.jsonl").unlink()
    assert len(prepare(config, tok, tok.eos_ids).train) == 1
    assert len(reads) == 4


@pytest.mark.parametrize(
    ("told", "same", "other"),
    [
        ("", timedelta(days=400), None),
        (
            "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
            timedelta(hours=3),
            timedelta(days=1),
        ),
        ("{% set now = strftime_now %}{{ now('%Y') }}", timedelta(0), timedelta(seconds=1)),
        ("{% set form = '%Y' %}{{ strftime_now(form) }}", timedelta(0), timedelta(seconds=1)),
    ],
)
def test_the_clock_counts_only_as_far_as_the_template_tells_it(root, tok, tmp_path, reads, told, same, other):
    dated = with_template(root, tmp_path, "llama", told + LOOP)
    path = write_jsonl(tmp_path / "a.jsonl", records(10))
    start = datetime(2026, 1, 31, 12)
    for clock, count in ((start, 1), (start + same, 1), (start + (other or same), 2 if other else 1)):
        prepare(config_of(path, clock=clock.isoformat()), dated, dated.eos_ids)
        assert len(reads) == count
    # Without a clock, today counts.
    prepare(config_of(path), dated, dated.eos_ids)
    assert len(reads) == (3 if other else 1)


def test_errors_are_not_kept(tok, tmp_path, folder, reads):
    path = tmp_path / "a.jsonl"
    for content, match in (([{"messages": 1}], "None of the 1 records"), ([], "no records")):
        write_jsonl(path, content)
        for _ in range(2):
            with pytest.raises(PshareError, match=match):
                prepare(config_of(str(path)), tok, tok.eos_ids)
        assert list(folder.iterdir()) == []
    assert len(reads) == 4
    with pytest.raises(PshareError, match="no data file"):
        prepare(config_of(str(tmp_path / "missing.jsonl")), tok, tok.eos_ids)


def test_a_source_that_changes_while_it_is_read_is_an_error(tok, tmp_path, folder, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", records(10))

    def growing(source):
        yield from read_source(source)
        write_jsonl(Path(path), records(11))

    monkeypatch.setattr(rendering, "read_source", growing)
    with pytest.raises(PshareError, match="changed while it was read"):
        prepare(config_of(path), tok, tok.eos_ids)
    assert list(folder.iterdir()) == []


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_damaged_set_is_prepared_again(tok, tmp_path, folder, reads):
    path = write_jsonl(tmp_path / "a.jsonl", records(30))
    first = content(prepare(config_of(path), tok, tok.eos_ids))
    (kept,) = folder.iterdir()
    names = sorted(file.name for file in kept.iterdir())
    for count, name in enumerate(names, start=2):
        file = kept / name
        file.write_bytes(file.read_bytes()[:-5])
        assert content(prepare(config_of(path), tok, tok.eos_ids)) == first, name
        assert len(reads) == count
        file.unlink()
        prepare(config_of(path), tok, tok.eos_ids)
        reads.pop()
    assert [entry.name for entry in folder.iterdir()] == [kept.name]


def test_the_last_used_sets_are_kept_and_those_that_are_read(tok, tmp_path, folder):
    sets = PreparedSets(folder)

    def add(key: str) -> None:
        with sets.new(key) as part:
            (part / "file").write_text(key)
        os.utime(folder / key, ns=(len(added), len(added)))
        added.append(key)

    added: list[str] = []
    for number in range(KEPT):
        add(f"key{number}")
    assert sets.find("key0") == folder / "key0"
    held = hold(folder / "key1")
    add("more")
    add("last")
    assert {path.name for path in folder.iterdir()} == {*added} - {"key2"}
    os.close(held)
    assert sets.find("key2") is None
    assert (folder / "key1" / "file").read_text() == "key1"


def test_two_processes_may_prepare_the_same_set(folder):
    sets = PreparedSets(folder)
    with sets.new("key") as slow:
        with sets.new("key") as fast:
            (fast / "file").write_text("fast")
        (slow / "file").write_text("slow")
    assert [path.name for path in folder.iterdir()] == ["key"]
    assert (folder / "key" / "file").read_text() == "fast"


KILLED = """
import os, signal, sys
from pathlib import Path
from pshare_jax.training.data.cache import PreparedSets
with PreparedSets(Path(sys.argv[1])).new("key") as part:
    (part / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed(folder):
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    sets = PreparedSets(folder)
    assert sets.find("key") is None
    with sets.new("other"), sets.new("third") as part:
        assert not left.exists()
        assert part.exists()
    assert {path.name for path in folder.iterdir()} == {"other", "third"}


def test_an_error_or_interrupt_leaves_nothing(folder):
    def fail(error: type[BaseException]) -> None:
        with PreparedSets(folder).new("key") as part:
            (part / "file").write_text("half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
        assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, tok, folder):
    folder.write_text("a file")
    path = write_jsonl(tmp_path / "a.jsonl", records(10))
    with pytest.raises(PshareError, match=r"Cannot write the cache folder .*XDG_CACHE_HOME"):
        prepare(config_of(path), tok, tok.eos_ids)


# --- workers ---------------------------------------------------------------------------------------------------------


def test_any_number_of_workers_gives_the_same(tok, tmp_path, folder):
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", records(count)) for name, count in (("a", 150), ("b", 3), ("c", 70))
    ]
    found = []
    for num_workers in (0, 1, 3):
        found.append(content(prepare(config_of(*paths, num_workers=num_workers), tok, tok.eos_ids)))
        shutil.rmtree(folder)
    assert found[0] == found[1] == found[2]


def test_an_error_comes_at_its_place_with_any_number(tok, tmp_path):
    """The first file has no usable record, the second does not exist: the first is told, whoever reads ahead."""
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": 1}] * 3)
    for num_workers in (0, 2):
        config = config_of(bad, str(tmp_path / "*.csv"), num_workers=num_workers)
        assert not list(tmp_path.glob("*.csv"))
        (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(PshareError, match="None of the 3 records"):
            prepare(config, tok, tok.eos_ids)
        (tmp_path / "a.csv").unlink()


def square(number: int) -> int:
    if number == 777:
        raise PshareError("Not this number.")
    if number == 999:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_ordered_map(num_workers):
    assert list(ordered_map(square, range(700), num_workers)) == [square(number) for number in range(700)]
    assert list(ordered_map(square, [], num_workers)) == []
    found = []
    with pytest.raises(PshareError, match="Not this number"):
        found.extend(ordered_map(square, range(1000), num_workers))
    results = ordered_map(square, range(1000), num_workers)
    assert [next(results) for _ in range(777)] == [square(number) for number in range(777)]
    with pytest.raises(PshareError, match="Not this number"):
        next(results)


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(PshareError, match="died with exit code -9"):
        list(ordered_map(square, range(900, 1100), 2))


def test_a_tokenizer_is_the_same_in_another_process(tok, root):
    for tokenizer in (tok, *tokenizers(root).values()):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.template_fingerprint == tokenizer.template_fingerprint
        assert (copy.eos_ids, copy.template_variables) == (tokenizer.eos_ids, tokenizer.template_variables)
        messages = chat("<|im_end|> hello", "there", system="s")
        assert copy.encode_chat(messages) == tokenizer.encode_chat(messages)
