"""What the repository ships as results: tables in the docs are those of the committed numbers, and the demo modules are served,
small, told in their cards, and better than the base by the project's rule.
"""

import json
from pathlib import Path

import pytest

from experiments import bfcl_http
from experiments import distillation as distillation_experiment
from experiments import sharing_ratio as sharing_experiment
from experiments.demo_modules import DEMOS, markdown
from pshare_jax.server.config import ServeConfig
from pshare_jax.settings import load_settings
from pshare_jax.share.decode_module import read_manifest

ROOT = Path(__file__).parents[1]
ROWS = json.loads((ROOT / "docs" / "demo.json").read_text())
SHIPPED = sorted(path.name for path in (ROOT / "demo").iterdir())


def test_the_experiments_table_is_of_its_rows():
    rows = json.loads((ROOT / "docs" / "sharing.json").read_text())["rows"]
    assert sharing_experiment.markdown(rows) in (ROOT / "docs" / "sharing.md").read_text()
    for row in rows:
        assert row["accuracy"] == row["right"].count("1") / len(row["right"])


def test_the_table_of_distillation_is_of_its_rows():
    rows = json.loads((ROOT / "docs" / "distillation.json").read_text())["rows"]
    assert distillation_experiment.markdown(rows) in (ROOT / "docs" / "training.md").read_text()
    models = {model.name for model in distillation_experiment.MODELS}
    assert {(row["model"], row["seed"]) for row in rows} == {(name, seed) for name in models for seed in (0, 1, 2)}
    for row in rows:
        assert row["accuracy"] == row["right"].count("1") / len(row["right"])


def test_the_table_of_calls_over_http_is_of_its_rows():
    rows = json.loads((ROOT / "docs" / "bfcl_http.json").read_text())
    assert bfcl_http.markdown(rows) in (ROOT / "docs" / "serving.md").read_text()


def test_what_is_shipped_is_what_is_served_and_told():
    config = load_settings(ServeConfig, ROOT / "configs" / "serve" / "smollm2.yaml", [])
    assert config.tasks == {"chat": "base"} | {name: f"demo/{name}" for name in SHIPPED}
    assert set(SHIPPED) <= {demo.name for demo in DEMOS}
    assert markdown({name: ROWS[name] for name in SHIPPED}) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_module_is_small_and_beats_the_base(name):
    row, folder = ROWS[name], ROOT / "demo" / name
    assert row["module"] >= row["base"] + 0.10
    # Where the base's text may hold the answer among other words.
    assert row["module"] >= row.get("base, anywhere", 0) + 0.10
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6_000_000
    card = read_manifest(folder)
    assert (card.kind, card.prefill) == ("lora", "base")
    told = card.training["evaluation"]
    assert told[f"accuracy, `{row['task']}`"] == row["module"]
    assert told["run_alone"] == {row["task"]: row["alone"]}
