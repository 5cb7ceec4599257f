"""Evaluation from a task's name to the accuracy: questions in the form of training and serving, scored and counted."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_folder, tiny_module
from training_data import chat, write_jsonl

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.evaluation import tasks as eval_tasks
from pshare_jax.evaluation.evaluate import evaluate, load_any_module, main
from pshare_jax.evaluation.intervals import wilson
from pshare_jax.evaluation.tasks import Item, open_task
from pshare_jax.evaluation.verifiers import exact_match
from pshare_jax.share.decode_module import MANIFEST, DecodeModule, save_module
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tool_format import FORMATS
from pshare_jax.training.data.bfcl import openai_tools
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.data.sources import GYM

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
NEW = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def folder(root) -> Path:
    return tiny_folder("llama", root / "base", num_hidden_layers=2, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def base(folder) -> ps.Model:
    return ps.load(folder)


@pytest.fixture(scope="module")
def module_folder(folder, root) -> Path:
    return tiny_module(folder, root / "full", noise=0.4)


def opened(name: str, base: ps.Model) -> Any:
    return open_task(str(name), base)


def texts(base: ps.Model, items: list[Item]) -> list[str]:
    return [base.tokenizer.decode(item.prompt_ids, skip_special_tokens=False) for item in items]


def test_every_answer_of_a_file_is_a_question(base, tmp_path):
    """With the system prompt, the tools and the true conversation before it; marks of training count here too."""
    calls = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}]
    records = [
        {"messages": chat("one", "1", "two", "2", system="Count."), "tools": [TOOL]},
        {"messages": [*chat("look"), {"role": "assistant", "content": "", "tool_calls": calls}]},
        {"messages": [chat("a", "not asked")[0], {**chat("a", "b")[1], "train": False}, *chat("c", "d")]},
        {"prompt": "p", "completion": "c"},
        {"messages": chat("no answer")},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    with opened(path, base) as task:
        assert [item.expected for item in task.items][0:2] == ["1", "2"]
        assert '"name": "look"' in task.items[2].expected
        assert [item.expected for item in task.items][3:] == ["d", "c"]
        assert [item.name for item in task.items] == [f"{path}:{line}" for line in (1, 1, 2, 3, 4)]
        wanted = [
            base.tokenizer.encode_chat(records[0]["messages"][:2], tools=[TOOL]),
            base.tokenizer.encode_chat(records[0]["messages"][:4], tools=[TOOL]),
            base.tokenizer.encode_chat(records[1]["messages"][:1]),
        ]
        assert [list(item.prompt_ids) for item in task.items[:3]] == wanted
        assert "Count." in texts(base, task.items)[0]
        assert "Looks." in texts(base, task.items)[0]
        assert all(task.verifier(f" {item.expected}\n", item.record) == 1 for item in task.items)
        assert "no assistant turn" in str(task.report)


def test_reasoning_gym_asks_what_it_trains(base):
    name = f"{GYM}chain_sum?size=6&seed=7"
    data = prepare(DataConfig([SourceConfig(name)]), base.tokenizer, base.stop_ids)
    with opened(name, base) as task:
        assert len(task.items) == 6
        for sample, item in zip(data.train.store, task.items, strict=True):
            assert sample.ids[: sample.turns[0][0]] == item.prompt_ids
            assert task.verifier(item.expected, item.record) == 1


def test_bfcl_asks_with_functions_and_judges_calls(base, monkeypatch):
    """Without the wheel: the questions are the test's own."""
    functions = [{"name": "a.b", "parameters": {"type": "dict", "properties": {}, "required": []}}]
    question = {
        "id": "simple_0",
        "category": "simple_python",
        "messages": [{"role": "user", "content": "Do."}],
        "tools": openai_tools(functions),
        "functions": functions,
        "ground_truth": [{"a.b": {}}],
    }
    monkeypatch.setattr(eval_tasks, "fetch_wheel", lambda: Path("no.whl"))
    monkeypatch.setattr(eval_tasks, "read_questions", lambda category, wheel: [question])
    style = ChatStyle(FORMATS["json_list"])
    with open_task("bfcl:simple", base, style) as task:
        [item] = task.items
        asked = base.tokenizer.encode_chat(question["messages"], tools=question["tools"], style=style)
        assert list(item.prompt_ids) == asked
        assert json.dumps(question["tools"][0]["function"]) in texts(base, [item])[0]
        assert '"type": "object"' in texts(base, [item])[0]
        assert task.verifier("not a call", item.record) == 0


@pytest.fixture(scope="module")
def asked(base, tmp_path_factory) -> list[Item]:
    words = ["the and", "user", "system is", "on at", "er on the", "a", "bb c", "dd"]
    path = write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", [{"messages": chat(w, "x")} for w in words])
    with opened(path, base) as task:
        return task.items


@pytest.mark.parametrize("ratio", [1.0, 0.0])
def test_answers_are_those_of_the_plain_loop(base, module_folder, asked, ratio):
    """The scored texts, in order; with ratio 0 the texts of the fine-tune without sharing."""
    module = load_any_module(str(module_folder), base)
    shared = ps.factorize(base if ratio else ps.load(module_folder))
    shared.add_task("m", module if ratio else "base")
    want = []
    for item in asked:
        ids = ps.generate(shared, "m", item.prompt_ids, max_new_tokens=NEW)
        cut = ids[-1] not in base.stop_ids
        want.append((base.tokenizer.decode(ids if cut else ids[:-1]), cut, len(ids)))
    right = {want[1][0], want[4][0]}
    done: list[int] = []
    settings = {"max_new_tokens": NEW, "sharing_ratio": ratio, "rows": 2, "progress": done.append}
    result = evaluate(base, {"m": module}, asked, lambda answer, _: 1.0 if answer in right else 0.5, **settings)["m"]
    assert [(answer.answer, answer.cut) for answer in result.answers] == [(text, cut) for text, cut, _ in want]
    assert result.num_tokens == sum(length for _, _, length in want)
    assert done == list(range(1, len(asked) + 1))
    num_right = sum(text in right for text, _, _ in want)
    assert result.accuracy == num_right / len(asked) < 1
    assert result.mean_score == pytest.approx((num_right + len(asked)) / 2 / len(asked))
    summary = result.summary(num_samples=1)
    assert [answer["answer"] for answer in summary["right"]] == [want[1][0]]
    assert [answer["answer"] for answer in summary["wrong"]] == [want[0][0]]
    assert summary["scores"][1] == 1.0


def test_the_ratio_matters(base, module_folder, asked):
    module = load_any_module(str(module_folder), base)

    def answers(ratio: float) -> list[str]:
        results = evaluate(base, {"m": module}, asked, exact_match, max_new_tokens=NEW, sharing_ratio=ratio)
        return [answer.answer for answer in results["m"].answers]

    assert answers(1.0) != answers(0.0) != answers(0.5)


def test_nothing_to_ask(base):
    with pytest.raises(PshareError, match="no questions"):
        evaluate(base, {"base": load_any_module("base", base)}, [], exact_match, max_new_tokens=1)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (3, 10), (7, 500), (1, 1)])
def test_wilson_solves_its_equation(right, total):
    """Its ends are the shares p from which right / total is 1.96 standard errors away."""
    for end in wilson(right, total):
        assert 0 <= end <= 1
        assert math.isclose((right / total - end) ** 2, 1.959964**2 * end * (1 - end) / total, abs_tol=1e-12)
    low, high = wilson(right, total)
    assert low <= right / total <= high
    assert low < high


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_command_line(folder, module_folder, tmp_path, capsys):
    """A full fine-tune without a card, on base KV and by itself; the numbers are in the file and on the terminal."""
    plain = tmp_path / "fine-tune"
    plain.mkdir()
    for file in module_folder.iterdir():
        if file.name != MANIFEST:
            (plain / file.name).write_bytes(file.read_bytes())
    data = write_jsonl(
        tmp_path / "data.jsonl", [{"messages": chat("a", "b")}, {"messages": []}, {"messages": chat("c", "d")}]
    )
    output = tmp_path / "results.json"
    arguments = ("--base", folder, "--module", plain, "--task", data, "--max-new-tokens", 4, "--output", output)
    assert run(*arguments, "--sharing-ratio", 0.5, "--rows", 2) == 0
    printed = capsys.readouterr()
    assert f"{data}: 0.0% right (0 of 2; 95 % interval 0.0% to 65.8%)" in printed.out
    assert "dropped: 1 x no messages (line 2)" in printed.err
    result = json.loads(output.read_text())
    assert (result["sharing_ratio"], result["num_items"], result["dtype"]) == (0.5, 2, "float32")
    assert (result["scores"], len(result["wrong"]), result["right"]) == ([0.0, 0.0], 2, [])
    assert result["wrong"][1]["expected"] == "d"


def test_a_card_tells_what_was_evaluated(folder, base, tmp_path, capsys):
    module = DecodeModule(base.architecture, base.params, base.mesh)
    training = {"base": "b", "method": "prefillshare", "module": {"kind": "full"}, "data": [], "applied_steps": 1}
    training |= {"trained_tokens": 2, "learning_rate": 0.1}
    save_module(tmp_path / "m", module, base, training=training)
    save_module(tmp_path / "bare", module, base)
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": chat("a", "b")}])
    common = (
        "--base",
        folder,
        "--task",
        data,
        "--max-new-tokens",
        2,
        "--output",
        tmp_path / "o",
        "--card",
        tmp_path / "m",
    )
    assert run(*common, "--module", tmp_path / "m") == 0
    assert run(*common, "--module", tmp_path / "m", "--sharing-ratio", 0) == 0
    assert run(*common, "--module", "base") == 0
    text = (tmp_path / "m" / "README.md").read_text()
    assert f"What it scores run alone is: {data} 0." in text
    assert f"| accuracy, `{data}` | 0 |" in text
    assert f"| accuracy of the base, `{data}` | 0 |" in text
    assert run(*common, "--module", tmp_path / "m", "--sharing-ratio", 0.5) == 2
    assert run(*common, "--module", tmp_path / "bare") == 2
    assert run(*common[:-1], tmp_path / "bare", "--module", "base") == 2
    errors = capsys.readouterr().err.splitlines()
    assert [error.partition("--card")[2] for error in errors[1:]] == [
        f" {tmp_path / 'm'} must be the folder of --module, {tmp_path / 'bare'}.",
        f" {tmp_path / 'bare'} has no model card, since its manifest has no training record; leave --card out.",
    ]
    assert "set --sharing-ratio to 1 or 0" in errors[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--task": "missing.jsonl"}, "There is no data file missing.jsonl"),
        ({"--task": "reasoning_gym:no_such"}, "has no task 'no_such'"),
        ({"--module": "missing"}, "there is no decode module folder missing."),
        ({"--output": "missing/results.json"}, "--output: missing is not a folder"),
        ({"--sharing-ratio": "2"}, "from 0 to 1, not 2.0"),
        ({"--card": "missing"}, "there is no decode module folder missing."),
        ({"--max-new-tokens": "1024"}, "at most 1024 tokens"),
    ],
)
def test_mistakes_end_in_one_sentence(folder, tmp_path, monkeypatch, capsys, changes, sentence):
    monkeypatch.chdir(tmp_path)
    options = {"--base": folder, "--module": "base", "--task": "reasoning_gym:chain_sum?size=1", **changes}
    assert run(*(word for pair in options.items() for word in pair)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.count("\n") == 1
