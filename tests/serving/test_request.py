"""request.py: the states of a sequence and when it ends."""

import itertools

import pytest
from serving_fakes import EOS, ByteDetokenizer

from pshare_jax.serving.output import TextOutput
from pshare_jax.serving.request import LEGAL, Event, IllegalTransition, Request, Sequence, State


def sequence(**fields):
    request = Request("r", "task", (1, 2), **{"max_tokens": 9, **fields})
    return Sequence(request, TextOutput(ByteDetokenizer(), request.stop), lambda event: None)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_only_legal_transitions(before, after):
    seq = sequence()
    seq.state = before
    if after in LEGAL[before]:
        seq.move(after)
        assert seq.state is after
        return
    with pytest.raises(IllegalTransition, match=f"from {before.value} to {after.value}"):
        seq.move(after)


def test_every_live_state_can_fail_and_abort_and_final_ones_lead_nowhere():
    for state, ways in LEGAL.items():
        final = state in (State.FINISHED, State.ABORTED, State.FAILED)
        assert final == (not ways)
        assert final or {State.FAILED, State.ABORTED} <= ways


def test_a_final_state_drops_the_kv():
    seq = sequence()
    seq.kv = object()
    seq.move(State.ABORTED)
    assert seq.kv is None


def feed(seq, ids):
    return [seq.accept(token) for token in ids]


def test_ends_by_length_counting_every_token():
    events = feed(sequence(max_tokens=2), b"ab")
    assert events == [Event("a", 1), Event("b", 2, "length")]


def test_ends_at_an_end_id_that_is_counted_but_not_shown():
    events = feed(sequence(stop_ids=frozenset({EOS})), [97, EOS])
    assert events[-1] == Event("", 2, "stop")


def test_an_end_id_releases_what_a_stop_string_held():
    events = feed(sequence(stop=("abX",), stop_ids=frozenset({EOS})), [*b"ab", EOS])
    assert events == [Event("", 1), Event("", 2), Event("ab", 3, "stop")]


def test_ends_at_a_stop_string():
    assert feed(sequence(stop=("bc",)), b"abc")[-1] == Event("", 3, "stop")
    assert feed(sequence(stop=("bc",), max_tokens=3), b"abc")[-1] == Event("", 3, "stop")


def test_a_half_character_at_the_limit_is_flushed():
    assert feed(sequence(max_tokens=1), "é".encode()[:1]) == [Event("\ufffd", 1, "length")]
