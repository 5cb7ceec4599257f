"""Training and test data that overlap: how questions are compared, and how BFCL's sources leave out what a test asks."""

import json
from pathlib import Path

import pytest

from pshare_jax.errors import PshareError
from pshare_jax.training.data.bfcl import asked_in, fetch_wheel, parse_source
from pshare_jax.training.data.files import Broken
from pshare_jax.training.data.overlap import asked, joined, normalised
from pshare_jax.training.data.sources import read_source

pytestmark = pytest.mark.host


def user(*texts: str) -> dict:
    return {"messages": [{"role": "user", "content": text} for text in texts]}


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    "texts",
    [
        ("What is it?", "  what\nis   IT ", "What is it", "“What” is—it…", "what_is_it?!"),
        ("Add 3 to Straße 5.", "add 3 to strasse 5"),
        ("Ünited, ﬁne", "u\u0308nited fine"),
        ("state-of-the-art / new", "state of the art new"),
        ("3 - 2 =", "3  -  2  ="),
    ],
)
def test_texts_that_differ_in_case_space_and_punctuation_are_equal(texts):
    assert len(set(map(normalised, texts))) == 1


@pytest.mark.parametrize(
    "texts", [("3 + 2", "3 - 2", "3 * 2", "3 / 2", "3 % 2", "3 ^ 2"), ("🙂", "🙃"), ("?", "!"), ("a b", "ab")]
)
def test_texts_with_other_words_or_operators_differ(texts):
    assert len(set(map(normalised, texts))) == len(texts)


def test_a_record_is_compared_in_every_form_that_training_reads():
    forms = [
        {"messages": [{"role": "system", "content": "s"}, *user("Hi there")["messages"]]},
        {"messages": json.dumps(user("hi THERE")["messages"])},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi there!"}]}]},
        {"prompt": "Hi, there", "completion": "x"},
        {"prompt": user("hi there")["messages"], "completion": "x"},
    ]
    assert len({asked(form) for form in forms}) == 1
    lists = [[tool("Get.max_value")], json.dumps([tool("getMaxValue")]), [{"name": "get_max_value"}]]
    assert len({asked({**user("q"), "tools": tools}).functions for tools in lists}) == 1
    # What is malformed is not compared, and dropped elsewhere.
    for odd in (
        {},
        {"messages": 3, "tools": "{"},
        {"messages": [1, {"role": "user"}], "tools": [{"function": 2}, None]},
    ):
        assert not asked(odd).functions


def test_a_test_asks_its_last_message_and_training_answers_all():
    train, test = asked(user("a", "b", "c")), asked(user("c", "d", "B?"))
    assert train.answers(test)
    assert not test.answers(asked(user("c", "x")))
    assert not asked(user("a")).answers(asked(user("a", "b")))
    tools = [asked({**user(text), "tools": [tool("f")]}) for text in ("m", "n")]
    assert tools[0].answers(tools[1])
    assert joined([train, tools[0]]).answers(tools[1])
    assert not joined([]).answers(test)


# --- BFCL ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel() -> Path:
    try:
        return fetch_wheel()
    except PshareError as error:
        pytest.skip(f"bfcl-eval: {error}")


@pytest.mark.parametrize(
    "query", ["?", "?without=", "?without=simple", "?with=bfcl:simple", "?without=bfcl:simple&size=3"]
)
def test_other_settings_are_refused(query):
    with pytest.raises(PshareError, match="without=bfcl:<category>"):
        parse_source(f"bfcl:multiple{query}")


def test_a_category_to_leave_out_must_exist(wheel):
    with pytest.raises(PshareError, match="no category 'plain'"):
        list(read_source("bfcl:multiple?without=bfcl:plain"))


def test_what_another_category_asks_is_left_out_and_reported(wheel):
    test = asked_in("simple", wheel)
    whole, cut = (list(read_source(f"bfcl:multiple{query}")) for query in ("", "?without=bfcl:simple"))
    assert [record.line for record in cut] == [record.line for record in whole]
    left_out = 0
    for before, after in zip(whole, cut, strict=True):
        if isinstance(after.content, Broken):
            assert after.content.reason == "asked by bfcl:simple"
            assert asked(before.content).answers(test)
            left_out += 1
        else:
            assert after.content == before.content
    assert 0 < left_out < len(whole)
