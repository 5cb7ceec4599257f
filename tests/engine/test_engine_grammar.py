"""Grammars in the engine on fake workers: the matcher follows the answer through preemptions and failed steps, and what
goes wrong with one answer ends it alone.
"""

import dataclasses

import pytest
from fake_engine import Client, make_engine
from serving_fakes import EOS, Echo

from pshare_jax.engine.request import Request
from pshare_jax.engine.sequence import State
from pshare_jax.errors import PshareError
from pshare_jax.text.grammar import BadGrammar, Grammar

pytestmark = pytest.mark.host
LETTERS = Grammar.of_regex("[a-z]{20}[0-9]{1,20}")
ECHO = Echo("t")


def texts(fakes, client, names):
    fakes.run()
    return {name: (client.text(name), client.end(name)) for name in names}


def ask_all(client):
    """Three constrained answers and one without a grammar."""
    names = [client.ask(f"c{i}", [i + 1] * 17, max_tokens=30, grammar=LETTERS) for i in range(3)]
    return [*names, client.ask("free", [9] * 17, max_tokens=30)]


@pytest.fixture(scope="module")
def expected():
    fakes = make_engine({"t": ECHO}, pages=256)
    client = Client(fakes)
    found = texts(fakes, client, ask_all(client))
    assert client.ids("free") == ECHO.answer([9] * 17, 30)
    assert all(len(text) >= 21 and reason in ("stop", "length") for text, reason in found.values())
    return found


@pytest.mark.parametrize("colocated", [False, True])
def test_preemptions_change_nothing(expected, colocated):
    fakes = make_engine({"t": ECHO}, pages=28, decode_pages=28, colocated=colocated)
    client = Client(fakes)
    names = ask_all(client)
    assert texts(fakes, client, names) == expected
    assert fakes.engine.decode_workers[0].num_preempted > 0


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("num_failures", [1, 3])
def test_failed_steps_change_nothing(expected, colocated, num_failures, caplog):
    fakes = make_engine({"t": ECHO}, pages=256, colocated=colocated)
    client = Client(fakes)
    names = ask_all(client)
    for failure in range(num_failures):
        fakes.step_until(lambda done=4 + 5 * failure: all(len(client.ids(name)) > done for name in names))
        fails_once(fakes.decode["t"])
    assert texts(fakes, client, names) == expected
    assert fakes.engine.decode_workers[0].pool.generation == num_failures


def fails_once(weights):
    def fail():
        weights.before = lambda: None
        raise RuntimeError("made to fail")

    weights.before = fail


def test_a_mask_that_fails_ends_its_answer_alone(expected, caplog):
    fakes = make_engine({"t": ECHO}, pages=256)
    client = Client(fakes)
    names = ask_all(client)
    bad = client.ask("bad", [7] * 17, grammar=Grammar.of_choice(["abc"]), stop_ids=frozenset({ord("c"), EOS}))
    assert texts(fakes, client, names) == expected
    assert client.state(bad) is State.FAILED
    assert "stop token" in str(client.end(bad))
    assert client.events[bad][-1].retry is False
    assert client.text(bad) == "ab"
    assert fakes.engine.decode_workers[0].pool.generation == 0


@pytest.mark.parametrize("grammar", [Grammar.of_regex("("), Grammar.of_lark("start: other")])
def test_a_bad_grammar_is_refused_before_anything_is_queued(grammar):
    fakes = make_engine({"t": ECHO})
    good = Request("good", "t", (1, 2), 4)
    with pytest.raises(BadGrammar):
        fakes.engine.submit_all([good, dataclasses.replace(good, id="bad", grammar=grammar)], [None, None])
    assert fakes.engine.idle


def test_an_engine_without_grammars_refuses_them():
    fakes = make_engine({"t": ECHO})
    fakes.engine.facts = dataclasses.replace(fakes.engine.facts, grammars=None)
    with pytest.raises(PshareError, match="without grammars"):
        Client(fakes).ask(grammar=LETTERS)
