"""Held-out questions: the requested number, none twice, none in the training data; and what counts as stated in a text."""

import pytest
from tiny import tiny_folder

import pshare_jax as ps
from experiments.demo_modules import _spoken
from experiments.held_out import held_out
from pshare_jax.evaluation.evaluate import Answer
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.data.sources import open_reasoning_gym


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
