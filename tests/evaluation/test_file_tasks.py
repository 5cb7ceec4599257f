"""Tasks from data files: the verifier that a YAML file names judges what the file's records ask."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_folder
from training_data import chat, write_jsonl

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.evaluation.evaluate import main
from pshare_jax.evaluation.tasks import Task, open_task

GSM8K = [
    {"question": "How many are 1,000 and 234?", "answer": "1000 + 234 = <<1000+234=1234>>1234\n#### 1,234"},
    {"question": "And half of 7?", "answer": "7 / 2 = 3.5\n#### 3.5"},
]
HUMAN_EVAL = {
    "task_id": "Own/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    return tiny_folder("llama", root / "base", num_hidden_layers=1, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def base(folder) -> ps.Model:
    return ps.load(folder)


def task_file(root: Path, records: list[Any], **settings: Any) -> str:
    data = write_jsonl(root / "data.jsonl", records)
    (root / "task.yaml").write_text(yaml.safe_dump({"path": data, **settings}))
    return str(root / "task.yaml")


def opened(name: str, base: ps.Model, **options: Any) -> Task:
    with open_task(name, base, **options) as task:
        return task


def test_numbers_of_gsm8k(base, tmp_path):
    """Asked as training reads the shape; the last number counts, whatever stands before it."""
    task = opened(task_file(tmp_path, GSM8K, shape="question_answer", verifier="number"), base)
    question = [{"role": "user", "content": GSM8K[0]["question"]}]
    assert list(task.items[0].prompt_ids) == base.tokenizer.encode_chat(question)
    for item, right, wrong in zip(task.items, ("It is $1,234.", "7/2"), ("234", "3"), strict=True):
        assert task.verifier(right, item.record) == task.verifier(item.expected, item.record) == 1
        assert task.verifier(wrong, item.record) == task.verifier("none", item.record) == 0
    assert task.notes == ()


def test_a_pattern(base, tmp_path):
    records = [{"messages": chat("Which of A to D?", "The answer is C.")}]
    task = opened(task_file(tmp_path, records, verifier="regex", pattern="answer is ([A-D])"), base)
    [item] = task.items
    assert task.verifier("I think the answer is C", item.record) == 1
    assert task.verifier("the answer is D", item.record) == 0


@pytest.mark.parametrize("form", ["chat", "text"])
def test_programs_by_human_evals_fields(base, tmp_path, form):
    """The fields of the record reach the verifier, also where `columns` renames one of them."""
    name = task_file(tmp_path, [HUMAN_EVAL], columns={"completion": "canonical_solution"}, verifier="code", format=form)
    task = opened(name, base, run_code=True)
    [item] = task.items
    assert task.verifier("    return x + x", item.record) == 1
    assert task.verifier("```python\ndef double(x):\n    return x + x\n```", item.record) == 1
    assert task.verifier("    return x * x", item.record) == 0
    if form == "text":
        assert base.tokenizer.decode(item.prompt_ids, skip_special_tokens=True).strip() == HUMAN_EVAL["prompt"].strip()


def test_programs_by_mbpps_fields(base, tmp_path):
    record = {"text": "Double x.", "code": "def double(x):\n    return 2 * x", "test_list": ["assert double(4) == 8"]}
    columns = {"prompt": "text", "completion": "code", "test": "test_list"}
    task = opened(task_file(tmp_path, [record], columns=columns, verifier="code"), base, run_code=True)
    [item] = task.items
    assert task.verifier("def double(x): return x + x", item.record) == 1
    assert task.verifier("def double(x): return x", item.record) == 0


def test_programs_run_only_where_that_is_allowed(base, folder, tmp_path, capsys):
    """No program runs without the switch, not even the record's own."""
    trace = tmp_path / "trace"
    record = {"prompt": "a", "completion": f"open({str(trace)!r}, 'w')", "test": "pass"}
    name = task_file(tmp_path, [record], verifier="code")
    common = ["--base", str(folder), "--module", "base", "--task", name, "--max-new-tokens", "2"]
    assert main(common) == 2
    assert "give --run-code" in capsys.readouterr().err
    assert not trace.exists()
    assert main([*common, "--run-code", "--output", str(tmp_path / "o.json")]) == 0
    assert trace.exists()
    assert json.loads((tmp_path / "o.json").read_text())["num_items"] == 1


def test_questions_whose_own_answer_is_wrong_are_left_out(base, folder, tmp_path, capsys):
    records = [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "none"}]
    name = task_file(tmp_path, records, verifier="number")
    task = opened(name, base)
    assert [item.expected for item in task.items] == ["1"]
    assert task.notes == ("1 of 2 questions are left out, whose own answer is not right",)
    assert main(["--base", str(folder), "--module", "base", "--task", name, "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    assert task.notes[0] in printed.err
    assert "(0 of 1;" in printed.out or "(1 of 1;" in printed.out
    with pytest.raises(PshareError, match="The verifier number finds none of the 1 answers"):
        opened(task_file(tmp_path, records[1:], verifier="number"), base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier": "regex"}, "verifier: regex needs a pattern"),
        ({"pattern": "a"}, "no other verifier has one"),
        ({"verifier": "regex", "pattern": "("}, "is not a regular expression of Python"),
        ({"verifier": "judge"}, "verifier"),
        ({"verifier": "code", "cpu_seconds": 0}, "cpu_seconds must be at least 1"),
        ({"shap": "alpaca"}, "shap"),
    ],
)
def test_wrong_settings(base, tmp_path, settings, message):
    with pytest.raises(PshareError, match=message):
        opened(task_file(tmp_path, GSM8K, **{"shape": "question_answer", **settings}), base, run_code=True)
