"""Held-out questions: the requested number, none twice, none in the training data; and what counts as stated in a text.

What the docs quote was asked of modules that were not trained on it: training and test share no user message and no function,
compared as in overlap.py.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_folder

import pshare_jax as ps
from experiments.demo_modules import DEMOS, _spoken
from experiments.held_out import held_out
from pshare_jax.errors import PshareError
from pshare_jax.evaluation.evaluate import Answer
from pshare_jax.settings import load_settings
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.bfcl import BFCL, asked_in, fetch_wheel
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig, paths_of
from pshare_jax.training.data.files import Broken
from pshare_jax.training.data.overlap import Asked, asked, joined
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.data.sources import open_reasoning_gym, read_source

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "configs" / "train").glob("*.yaml"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> ps.Model:
    folder = tiny_folder("llama", tmp_path_factory.mktemp("base"), num_hidden_layers=1, max_position_embeddings=1024)
    return ps.load(folder)


def config_of(path: str) -> TrainConfig:
    return TrainConfig(base="base", data=DataConfig([SourceConfig(path)]), output="unused")


def test_no_question_is_trained_on_or_asked_twice(base):
    path = "reasoning_gym:chain_sum?seed=3&size=60&min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    trained = {item["question"] for item in open_reasoning_gym(path)}
    with held_out(config_of(path), base, 50) as task:
        asked = [item.record["question"] for item in task.items]
        assert all(task.verifier(item.expected, item.record) == 1 for item in task.items)
    assert len(asked) == len(set(asked)) == 50
    assert not trained & set(asked)
    # The training's settings are the questions': two numbers of one digit.
    assert all(len(question.split()) == len(next(iter(trained)).split()) for question in asked)
    too_many = held_out(config_of(path), base, 400)
    with pytest.raises(SystemExit, match="400"):
        too_many.__enter__()


@pytest.mark.parametrize(
    ("expected", "text", "found"),
    [
        ("12", "The sum is 12.", True),
        ("12", "12", True),
        ("-3", "so -3 remains", True),
        ("3", "so -3 remains", False),
        ("3", "about 3.5", False),
        ("5", "about 3.5", False),
        ("12", "112 or 120", False),
        ("Ann", "It is Ann, of course", True),
        ("Ann", "It is Anna", False),
        ("1+1", "1+1", True),
    ],
)
def test_said_anywhere_is_said_as_a_word(expected, text, found):
    answer = Answer(name="q", prompt="p", answer=text, expected=expected, score=0.0, cut=False)
    assert _spoken(answer) is found


# --- what the docs quote ---------------------------------------------------------------------------------------------


def config_named(name: str) -> TrainConfig:
    return load_settings(TrainConfig, ROOT / "configs" / "train" / f"{name}.yaml", [])


def quoted(name: str) -> list[tuple[str, int]]:
    """The tests whose results docs/ quote for the module of a config: a task, or "" for unseen questions, and their number."""
    shown = {
        file: json.loads((ROOT / "docs" / f"{file}.json").read_text()) for file in ("demo", "sharing", "bfcl_http")
    }
    assert set(shown["demo"]) == {demo.name for demo in DEMOS}
    tests = [(demo.task or "", demo.questions) for demo in DEMOS if demo.name == name]
    tests += [(f"{BFCL}simple", row["questions"]) for row in shown["bfcl_http"].values() if row["task"] == name]
    setting = shown["sharing"]["setting"]
    if f"runs/{name}" == setting["config"]["output"]:
        tests.append(("", setting["questions"]))
    return sorted(set(tests))


def trained_on(config: TrainConfig) -> Asked:
    paths = [path for source in config.data.sources for path in paths_of(source)]
    contents = [record.content for path in paths for record in read_source(path)]
    return joined(asked(content) for content in contents if not isinstance(content, Broken))


def asked_by(task: str, count: int, config: TrainConfig, base: ps.Model) -> Asked:
    if task:
        return asked_in(task.removeprefix(BFCL), fetch_wheel())
    with held_out(config, base, count) as opened:
        return joined(asked({"prompt": item.record["question"]}) for item in opened.items)


def test_every_quoted_module_has_a_config():
    assert {name for name in CONFIGS if quoted(name)} == {*(demo.name for demo in DEMOS), "chain_sum"}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_and_test_data_are_disjoint(base, name):
    config = config_named(name)
    try:
        trained = trained_on(config)
        for task, count in quoted(name):
            assert not trained.answers(asked_by(task, count, config, base)), task
    except PshareError as error:
        if "package index" not in str(error) and "download" not in str(error):
            raise
        pytest.skip(str(error))
    data = replace(config.data, max_len=100_000, batch=RowsConfig())
    if data.has_evaluation:
        report = prepare(data, base.tokenizer, base.stop_ids).report
        assert (report.leaked, report.shared_functions) == (0, 0)
        assert report.eval_samples
