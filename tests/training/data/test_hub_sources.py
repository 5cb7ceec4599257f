"""Data sets of the Hugging Face hub, against a local stand-in for it (fake_hub.py): splits, configs, access, the cache.

Each reading is a process of its own, since the hub's library reads its settings when it is imported.
"""

import io
import re
from pathlib import Path

import pytest
from fake_hub import FakeHub, run_on_hub
from training_data import chat

pytestmark = pytest.mark.host
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

READ = """
import json, sys
from pshare_jax.errors import PshareError
from pshare_jax.training.data.sources import read_source
for source in sys.argv[1:]:
    try:
        print(json.dumps([list(record) for record in read_source(source)]))
    except PshareError as error:
        print(json.dumps(str(error)))
"""
CONVERTED = "refs/convert/parquet"


def table(*texts: str) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{"text": text} for text in texts]), file)
    return file.getvalue()


CHATS = io.BytesIO()
parquet.write_table(
    pyarrow.Table.from_pylist([{"messages": chat("q", "a"), "tools": None}, {"messages": chat("r", "b", "s", "c")}]),
    CHATS,
)
REPOSITORIES = {
    "org/sharded": {
        "main": {
            "README.md": b"x",
            "data/train-00000-of-00002.parquet": table("one", "two"),
            "data/train-00001-of-00002-0a1b.parquet": table("three"),
            "data/test-00000-of-00001.parquet": table("test"),
        },
        "v1": {"train.parquet": table("old")},
    },
    "org/configs": {
        "main": {
            "main/train-00000-of-00001.parquet": table("main"),
            "more/train-00000-of-00001.parquet": table("more"),
            "more/test-00000-of-00001.parquet": table("more test"),
        }
    },
    "org/lines": {
        "main": {"train.jsonl": b'{"text": "line"}\n'},
        CONVERTED: {
            "default/train/0000.parquet": table("converted"),
            "default/train/0001.parquet": table("again"),
            "other/partial-test/0000.parquet": table("partial"),
        },
    },
    "org/text": {"main": {"a.txt": b"x"}},
    "org/gated": {"main": {"data/train-00000-of-00001.parquet": table("secret")}},
    "org/chats": {"main": {"data/train-00000-of-00001.parquet": CHATS.getvalue()}},
}


@pytest.fixture(scope="module")
def hub():
    with FakeHub(REPOSITORIES, frozenset({"org/gated"})) as running:
        yield running


def read(hub: FakeHub, home: Path, *sources: str, **environment: str) -> list:
    """For each source the texts of its records, or the error."""
    found = run_on_hub(hub, home, READ, *sources, **environment)
    assert len(found) == len(sources)
    return [x if isinstance(x, str) else [record[2]["text"] for record in x] for x in found]


SPLITS = {
    "hf:org/sharded?split=train": ["one", "two", "three"],
    "hf:org/sharded/default?split=test": ["test"],
    "hf:org/sharded?revision=v1": ["old"],
    "hf:org/sharded?split=train&revision=v1": ["old"],
    "hf:org/configs/main": ["main"],
    "hf:org/configs/more?split=train": ["more"],
    "hf:org/configs?split=test": ["more test"],
    "hf:org/lines?split=train": ["converted", "again"],
    "hf:org/lines/other": ["partial"],
    f"hf:org/lines/default?split=train&revision={CONVERTED.replace('/', '%2F')}": ["converted", "again"],
}


def test_splits_are_read_in_the_order_of_their_files_and_again_from_the_cache(hub, tmp_path):
    assert read(hub, tmp_path, *SPLITS) == list(SPLITS.values())
    asked = len(hub.paths)
    assert read(hub, tmp_path, *SPLITS, HF_HUB_OFFLINE="1") == list(SPLITS.values())
    assert len(hub.paths) == asked
    # A hub that does not answer is no reason to fail either.
    nobody = FakeHub({})
    nobody._server.server_close()
    assert read(nobody, tmp_path, "hf:org/sharded?split=train") == [["one", "two", "three"]]
    read(hub, tmp_path, "hf:org/sharded?split=train")
    assert not any("resolve" in path for path in hub.paths[asked:])


def test_a_record_names_the_commit_the_file_and_its_row(hub, tmp_path):
    [records] = run_on_hub(hub, tmp_path, READ, "hf:org/sharded?split=train")
    commit = hub.commit("org/sharded", "main")
    names = ["train-00000-of-00002.parquet"] * 2 + ["train-00001-of-00002-0a1b.parquet"]
    assert [(source, line) for source, line, _ in records] == [
        (f"hf:org/sharded@{commit[:8]}/data/{name}", line) for name, line in zip(names, (1, 2, 1), strict=True)
    ]
    [records] = run_on_hub(hub, tmp_path, READ, "hf:org/chats?split=train")
    assert [content for _, _, content in records] == [
        {"messages": chat("q", "a")},
        {"messages": chat("r", "b", "s", "c")},
    ]


ERRORS = {
    "hf:org/none?split=train": "no public data set of that name",
    "hf:org/gated?split=train": "access is restricted.*hf auth login.*HF_TOKEN",
    "hf:org/sharded?revision=v9": "no such revision",
    "hf:org/sharded": r"several.*hf:org/sharded/default\?split=test, hf:org/sharded/default\?split=train",
    "hf:org/configs?split=train": r"several.*hf:org/configs/main\?split=train, hf:org/configs/more\?split=train",
    "hf:org/sharded?split=valid": r"none of the data set's splits; .*default\?split=test",
    "hf:org/sharded/other?split=train": r"none of the data set's splits; .*default\?split=test",
    "hf:org/text?split=train": "has no Parquet files",
    "hf:org/../x?split=train": "not a valid hub name|must have the form",
    "hf:sharded?split=train": "must have the form hf:org/name",
    "hf:org/sharded?part=train": "must have the form hf:org/name",
    "hf:org/sharded?split=": "must have the form hf:org/name",
}


def test_errors_are_one_sentence_with_the_way_out(hub, tmp_path):
    for (source, words), found in zip(ERRORS.items(), read(hub, tmp_path, *ERRORS), strict=True):
        assert isinstance(found, str), source
        assert "\n" not in found
        assert re.search(words, found), found


def test_a_token_opens_a_gated_data_set_and_its_cache_needs_none(hub, tmp_path):
    assert read(hub, tmp_path, "hf:org/gated?split=train", HF_TOKEN=hub.token) == [["secret"]]
    assert read(hub, tmp_path, "hf:org/gated?split=train", HF_HUB_OFFLINE="1") == [["secret"]]


def test_without_a_network_what_is_not_cached_is_refused(hub, tmp_path):
    [nothing] = read(hub, tmp_path, "hf:org/sharded?split=train", HF_HUB_OFFLINE="1")
    assert "cannot be reached and the data set is not in its cache" in nothing
    read(hub, tmp_path, "hf:org/sharded?split=test", "hf:org/lines?split=train")
    [other, whole, cut] = read(
        hub,
        tmp_path,
        "hf:org/sharded?split=train",
        "hf:org/sharded?split=test",
        "hf:org/lines/other",
        HF_HUB_OFFLINE="1",
    )
    assert "is not cached and the hub cannot be reached; cached is hf:org/sharded/default?split=test" in other
    assert whole == ["test"]
    assert "is not cached" in cut


@pytest.mark.parametrize("source", ["hf:org/sharded?split=train", "hf:org/lines?split=train"])
def test_half_a_split_is_never_read(hub, tmp_path, source):
    """The cache of an interrupted download, without a network."""
    read(hub, tmp_path, source)
    folder = next(path for path in tmp_path.rglob("*.parquet")).parent
    sorted(folder.glob("*train*" if "sharded" in source else "*"))[-1].unlink()
    [found] = read(hub, tmp_path, source, HF_HUB_OFFLINE="1")
    assert isinstance(found, str)
    assert "not in its cache" in found or "cached" in found
