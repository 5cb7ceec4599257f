"""pshare-export --push on a fake hub (helpers/writable_hub.py), and the metadata of cards as the hub's own library reads them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from tiny_runs import FULL, ROOT, make_base_and_data, run_config
from writable_hub import READER, WRITER, FakeHub, fake_hub

import pshare_jax as ps
from pshare_jax.share.decode_module import read_manifest, save_module
from pshare_jax.training.cli import export_main
from pshare_jax.training.model_card import base_license, write_model_card
from pshare_jax.training.run import train

NAME = "someone/arithmetic-module"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A LoRA run of two steps."""
    root = tmp_path_factory.mktemp("run")
    config = run_config(make_base_and_data(root, num_layers=1), root / "run", steps=2, accumulation=1)
    train(config)
    return Path(config.output)


@pytest.fixture
def hub(monkeypatch):
    """A fake hub with the token of a writer."""
    with fake_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def pushed(run: Path, output: Path, *more: str) -> int:
    return export_main(["--run", str(run), "--output", str(output), "--push", NAME, *more])


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_command_uploads_the_whole_folder(run, tmp_path):
    """In a process of its own, which learns the hub's address as users tell it."""
    with fake_hub() as hub:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": WRITER,
            "NO_PROXY": "127.0.0.1",
        }
        code = "import sys; from pshare_jax.training.cli import export_main; sys.exit(export_main())"
        options = ["--run", str(run), "--output", str(tmp_path / "m"), "--push", NAME, "--private"]
        done = subprocess.run([sys.executable, "-c", code, *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"pushed to {hub.address}/{NAME}" in done.stdout
        assert hub.models == {NAME: {"private": True, "files": files_of(tmp_path / "m")}}
    assert {"adapter_model.safetensors", "adapter_config.json", "decode_module.json", "README.md"} <= set(
        files_of(tmp_path / "m")
    )


def test_a_later_push_replaces_the_files(run, hub: FakeHub, tmp_path):
    assert pushed(run, tmp_path / "m") == 0
    hub.models[NAME]["files"]["README.md"] = b"old"
    assert pushed(run, tmp_path / "m") == 0
    assert hub.models == {NAME: {"private": False, "files": files_of(tmp_path / "m")}}


def test_a_public_model_does_not_get_what_should_be_private(run, hub: FakeHub, tmp_path, capsys):
    hub.models[NAME] = {"private": False, "files": {}}
    assert pushed(run, tmp_path / "m", "--private") == 2
    assert "is public, so nothing was uploaded" in capsys.readouterr().err
    assert hub.models[NAME]["files"] == {}


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("hf_unknown", "log in with `hf auth login`, or set HF_TOKEN"),
        ("", "log in with `hf auth login`, or set HF_TOKEN"),
        (READER, f"the token may not write to {NAME}; use a token with write access"),
    ],
)
def test_a_token_without_the_right_is_one_sentence_and_the_module_is_there(
    token, told, run, hub, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert pushed(run, tmp_path / "m") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pshare-export")]
    assert (
        line
        == f"pshare-export: The decode module is in {tmp_path / 'm'}, but was not pushed: {line.partition('pushed: ')[2]}"
    )
    assert line.endswith(f"{told}.")
    assert "adapter_config.json" in files_of(tmp_path / "m")
    assert hub.models == {}


def test_no_hub_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    with fake_hub() as gone:
        address = gone.address
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert pushed(run, tmp_path / "m") == 2
    assert "the hub cannot be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--push", "arithmetic"], "as ORG/MODEL"),
        (["--push", "a/b/c"], "as ORG/MODEL"),
        (["--push", "some one/model"], "as ORG/MODEL"),
        (["--private"], "give --push"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(options, told, run, tmp_path, capsys):
    assert export_main(["--run", str(run), "--output", str(tmp_path / "m"), *options]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


# --- cards -----------------------------------------------------------------------------------------------------------


def card_of(base: ps.Model, folder: Path, saved: ps.DecodeModule | None = None, **training) -> dict:
    """The metadata of a module's card, as the hub's library reads them."""
    fields = {"base": "org/base-model", "method": "prefillshare", "module": {"kind": "full"}, "data": ["a.jsonl"]}
    fields |= {"applied_steps": 1, "trained_tokens": 2, "learning_rate": 0.1, **training}
    save_module(folder, saved or base, base, training=fields, prefill=fields.pop("prefill", "base"))
    write_model_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.text.lstrip().startswith("**This")
    return card.data.to_dict()


@pytest.fixture(scope="module")
def base(run) -> ps.Model:
    return ps.load(run.parent / "base")


def test_a_full_modules_card(base, tmp_path):
    license_fields = {"license": "other", "license_name": "own", "license_link": "https://example.org"}
    data = ["hf:org/sums?split=train", "hf:org/sums?split=test", "hf:org/more", "a.jsonl", "reasoning_gym:chain_sum"]
    assert card_of(base, tmp_path / "m", data=data, base_license=license_fields) == {
        "base_model": "org/base-model",
        "base_model_relation": "finetune",
        "datasets": ["org/sums", "org/more"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pshare_jax", "prefillshare"],
        **license_fields,
    }


def test_an_adapters_card_and_config(base, run, tmp_path):
    module, shape = ps.load_module(run / "module", base), {"kind": "lora", "merged": False, "rank": 3, "alpha": 6.0}
    found = card_of(base, tmp_path / "m", module, module={**shape, "targets": ["q"]})
    assert (found["library_name"], found["base_model_relation"]) == ("peft", "adapter")
    assert found["tags"] == ["pshare_jax", "prefillshare", "lora"]
    settings = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == found["base_model"] == "org/base-model"


def test_a_base_without_a_name_on_the_hub_is_left_out(run):
    """As that of the run, a folder; it is in the text."""
    card = ModelCard.load(run / "module" / "README.md")
    assert not {"base_model", "base_model_relation", "license", "datasets"} & set(card.data.to_dict())
    assert json.loads((run / "module" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert read_manifest(run / "module").training["base"] in card.text


def test_the_bases_license_is_the_modules(run, tmp_path):
    root = run.parent
    (root / "base" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    config = run_config(
        (root / "base", str(root / "data.jsonl")), tmp_path / "run", steps=1, module=FULL, accumulation=1
    )
    train(replace(config, method="full_ft"))
    found = ModelCard.load(tmp_path / "run" / "module" / "README.md").data.to_dict()
    assert (found["license"], found["tags"]) == ("apache-2.0", ["pshare_jax"])
    (root / "base" / "README.md").unlink()


@pytest.mark.parametrize(
    "text", [None, "", "# no metadata", "---\nlicense: [\n---\n", "---\nlicense: 3\n---\n", "---\n- a\n---\n"]
)
def test_a_card_without_a_license(text, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert base_license(str(tmp_path)) == {}
    assert base_license("pypi:package") == base_license("org/not-downloaded") == {}


def test_the_license_of_a_hub_model_is_that_of_its_downloaded_card(tmp_path, monkeypatch):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(card))
    assert base_license("org/model") == {"license": "mit"}
