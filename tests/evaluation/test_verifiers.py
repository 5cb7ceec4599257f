"""What counts as right: texts, reasoning-gym's scores, and BFCL's checker, which must accept BFCL's own answers."""

import json

import pytest

from pshare_jax.errors import PshareError
from pshare_jax.evaluation.verifiers import exact_match, gym_verifier
from pshare_jax.text.tool_format import FORMATS, calls_text
from pshare_jax.training.data import bfcl
from pshare_jax.training.data.bfcl import (
    BfclVerifier,
    fetch_wheel,
    openai_tools,
    parse_calls,
    read_questions,
    right_calls,
)
from pshare_jax.training.data.files import Broken
from pshare_jax.training.data.sources import open_reasoning_gym, read_source

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("answer", "score"), [("42", 1), (" 42\n", 1), ("42.", 0), ("4 2", 0), ("", 0), ("the answer is 42", 0)]
)
def test_exact_match(answer, score):
    assert exact_match(answer, {"answer": "42\n"}) == score


def test_reasoning_gym_scores():
    dataset = open_reasoning_gym("reasoning_gym:chain_sum?size=5&seed=7")
    verify = gym_verifier(dataset)
    for item in dataset:
        assert verify(f" {item['answer']}\n", item) == 1
        assert 0 < verify(f"It is {item['answer']}", item) < 1
        assert verify("no number", item) == 0


def test_a_task_with_a_scorer_of_its_own():
    """Any sum that gives the number counts, not only the one that the item holds."""
    dataset = open_reasoning_gym('reasoning_gym:countdown?size=1&seed=3&operators=["+"]')
    item, verify = dataset[0], gym_verifier(dataset)
    turned = " + ".join(reversed(item["answer"].split(" + ")))
    assert turned != item["answer"]
    assert verify(turned, item) == 1
    assert verify(f"{turned} + 1", item) < 1


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}]', [{"f": {"a": 1}}]),
        (' [{"arguments": {}, "name": "a.b"}, {"name": "g", "arguments": {"x": [1.5]}}]\n', [{"a.b": {}}, {"g": {"x": [1.5]}}]),
        ("[]", None),
        ('{"name": "f", "arguments": {}}', [{"f": {}}]),
        ('[{"name": "f"}]', [{"f": {}}]),
        ('[{"name": "f", "arguments": "{}"}]', [{"f": {}}]),
        ('[{"name": "f", "arguments": "a"}]', None),
        ('[{"name": 1, "arguments": {}}]', None),
        ('[{"name": "f", "arguments": {}, "id": 1}]', [{"f": {}}]),
        ('Sure: [{"name": "f", "arguments": {}}]', None),
        ("[f(a=1)]", None),
        ("", None),
        ("[" * 100_000, None),
        ("9" * 5_000, None),
    ],
)  # fmt: skip
def test_parse_calls(text, calls):
    assert parse_calls(text, FORMATS["json_list"], ["f", "g", "a.b"]) == calls


@pytest.mark.parametrize("form", FORMATS.values(), ids=list(FORMATS))
def test_calls_are_parsed_in_the_modules_format(form):
    calls = [("f", {"a": "é"}), ("g", {})]
    assert parse_calls(calls_text(form, calls), form, ["f", "g"]) == [{name: arguments} for name, arguments in calls]


def test_bfcl_types_are_json_schema():
    """Also inside of objects and lists; a parameter may be called type."""
    properties = {
        "type": {"type": "string", "enum": ["dict", "any"]},
        "a": {"type": "dict", "properties": {"b": {"type": "float"}}},
        "c": {"type": "array", "items": {"type": "tuple", "items": {"type": "any"}}},
    }
    functions = [
        {"name": "f.g", "description": "d", "parameters": {"type": "dict", "properties": properties, "required": ["a"]}}
    ]
    want = {
        "type": {"type": "string", "enum": ["dict", "any"]},
        "a": {"type": "object", "properties": {"b": {"type": "number"}}},
        "c": {"type": "array", "items": {"type": "array", "items": {}}},
    }
    schema = {"type": "object", "properties": want, "required": ["a"]}
    function = {"name": "f.g", "description": "d", "parameters": schema}
    assert openai_tools(functions) == [{"type": "function", "function": function}]


@pytest.fixture(scope="module")
def wheel():
    try:
        return fetch_wheel()
    except PshareError as error:
        pytest.skip(f"bfcl-eval: {error}")


@pytest.fixture(scope="module")
def verify(wheel):
    with BfclVerifier(wheel, FORMATS["json_list"]) as verifier:
        yield verifier


@pytest.mark.parametrize(("category", "count"), [("simple", 400), ("multiple", 200)])
def test_bfcl_accepts_its_own_answers_and_no_others(wheel, verify, category, count):
    questions = read_questions(category, wheel)
    assert len(questions) == len({question["id"] for question in questions}) == count
    for question, other in zip(questions, questions[1:] + questions[:1], strict=True):
        right = answer_of(question)
        assert verify(json.dumps(right), question) == 1, question["id"]
        assert verify(json.dumps(right * 2), question) == 0
        assert verify(json.dumps([{**right[0], "name": "none"}]), question) == 0
        assert verify("[]", question) == 0
        if other["ground_truth"] != question["ground_truth"]:
            assert verify(json.dumps(answer_of(other)), question) == 0
        assert question["tools"] == openai_tools(question["functions"])
        assert [message["role"] for message in question["messages"]] == ["user"]


def test_bfcl_is_training_data(wheel, verify):
    """Questions in the evaluation's form, answers in the checker's; questions without a right answer are reported."""
    questions = read_questions("live_simple", wheel)
    records = list(read_source("bfcl:live_simple"))
    assert [record.line for record in records] == list(range(1, 259))
    broken = [record.content for record in records if isinstance(record.content, Broken)]
    assert broken == [
        ("no answer that BFCL accepts", "live_simple_106-63-0"),
        ("no answer that BFCL accepts", "live_simple_112-68-0"),
    ]
    for record, question in zip(records, questions, strict=True):
        if not isinstance(record.content, Broken):
            *prompt, answer = record.content["messages"]
            assert prompt == question["messages"]
            assert record.content["tools"] == question["tools"]
            calls = [(call["function"]["name"], call["function"]["arguments"]) for call in answer["tool_calls"]]
            assert verify(calls_text(FORMATS["json_list"], calls), question) == 1


def test_an_answer_has_the_first_values_and_leaves_out_what_it_may():
    """Choices inside of maps and lists of maps too."""
    truth = [
        {"f.g": {"a": [1, 2], "b": ["", "x"], "c": [[3, 4]], "d": [{"e": ["x"], "h": ["", 1]}], "i": [[{"j": [5]}]]}}
    ]
    want = [{"name": "f.g", "arguments": {"a": 1, "c": [3, 4], "d": {"e": "x"}, "i": [{"j": 5}]}}]
    assert right_calls(truth) == want


def answer_of(question) -> list[dict]:
    """Calls with the first possible value of every parameter that has one."""
    calls = []
    for call in question["ground_truth"]:
        [(name, parameters)] = call.items()
        values = {key: first(options) for key, options in parameters.items() if options != [""]}
        calls.append({"name": name, "arguments": {key: value for key, value in values.items() if value is not None}})
    return calls


def first(options: list):
    value = next((option for option in options if option != ""), None)
    return plain(value)


def plain(value):
    """In objects every key has a list of options too."""
    if isinstance(value, dict):
        return {key: first(options) for key, options in value.items() if isinstance(options, list) and options != [""]}
    return [plain(item) for item in value] if isinstance(value, list) else value


def test_arguments_that_the_checker_was_not_written_for(verify):
    """They are wrong, with the reason, and the next answer is scored as usual."""
    functions = [
        {"name": "f", "parameters": {"type": "dict", "properties": {"a": {"type": "dict"}}, "required": ["a"]}}
    ]
    question = {
        "id": "x",
        "category": "simple_python",
        "functions": functions,
        "ground_truth": [{"f": {"a": [{"b": 3}]}}],
    }
    verdict = verify.check([{"f": {"a": {"b": 3}}}], question)
    assert not verdict["valid"]
    assert "cannot compare" in verdict["reason"]
    question["ground_truth"] = [{"f": {"a": [{"b": [3]}]}}]
    assert verify.check([{"f": {"a": {"b": 3}}}], question)["valid"]
    assert "Missing required parameter: 'a'" in verify.check([{"f": {}}], question)["reason"]


def test_a_checker_that_ends_is_told(tmp_path, capfd):
    question = {"id": "simple_7", "category": "simple_python", "functions": [], "ground_truth": []}
    with (
        BfclVerifier(tmp_path / "no.whl", FORMATS["json_list"]) as verifier,
        pytest.raises(PshareError, match="simple_7"),
    ):
        verifier.check([], question)
    assert "No module named 'bfcl_eval'" in capfd.readouterr().err


def test_another_wheel_or_category_is_refused(wheel, tmp_path, monkeypatch):
    def download(name, version, target):
        (target / "bfcl_eval.whl").write_bytes(b"not it")
        return target / "bfcl_eval.whl"

    monkeypatch.setattr(bfcl, "download_wheel", download)
    with pytest.raises(PshareError, match="checksum"):
        fetch_wheel(tmp_path)
    assert not list(tmp_path.rglob("*.whl"))
    with pytest.raises(PshareError, match=r"java.* simple, multiple, parallel"):
        read_questions("java", wheel)
