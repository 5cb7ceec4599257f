"""request.py and sequence.py: the states of a sequence, its next input, and its end."""

import itertools
import time

import pytest
from serving_fakes import EOS, ByteDetokenizer

from pshare_jax.engine.request import ABORTED, FAILED, Event, Request, TokenLogprobs
from pshare_jax.engine.sequence import LEGAL, IllegalTransition, Sequence, State
from pshare_jax.share.boundary import Boundary
from pshare_jax.text.stop_strings import TextOutput

pytestmark = pytest.mark.host


def sequence(**fields):
    request = Request("r", "task", (1, 2), **{"max_tokens": 9, **fields})
    output, split = TextOutput(ByteDetokenizer(), request.stop), Boundary().split(request.prompt)
    return Sequence(request, output, [], split, lambda event: None)


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
        seq = sequence()
        seq.state = state
        assert seq.final == (state in (State.FINISHED, State.ABORTED, State.FAILED)) == (not ways)
        assert seq.final or {State.FAILED, State.ABORTED} <= ways


def test_a_request_can_walk_down_be_preempted_and_come_back():
    seq = sequence()
    walk = [State.PREFILLING, State.TRANSFERRING, State.DECODING]
    for state in [*walk, State.PREEMPTED, *walk, State.FINISHED]:
        seq.move(state)


def test_moves_and_tokens_are_progress():
    seq = sequence()
    for act in (lambda: seq.move(State.PREFILLING), lambda: seq.accept(97)):
        seq.progressed = 0.0
        act()
        assert time.monotonic() - seq.progressed < 10


def test_sequences_are_numbered_in_the_order_of_their_coming():
    first, second = sequence(), sequence()
    assert first.number < second.number


def test_the_last_token_is_the_next_input_and_not_in_the_kv_yet():
    seq = sequence()
    assert (seq.num_tokens, seq.next_input) == (2, 2)
    seq.accept(97)
    seq.accept(98)
    assert (seq.num_tokens, seq.next_input) == (4, 98)


def feed(seq, ids):
    return [seq.accept(token) for token in ids]


def test_ends_by_length_counting_every_token():
    events = feed(sequence(max_tokens=2), b"ab")
    assert events == [Event("a", 1, token_id=97), Event("b", 2, "length", token_id=98)]


def test_ends_at_an_end_id_that_is_counted_but_not_shown():
    events = feed(sequence(stop_ids=frozenset({EOS})), [97, EOS])
    assert events[-1] == Event("", 2, "stop", token_id=EOS)


def test_an_end_id_releases_what_a_stop_string_held():
    events = feed(sequence(stop=("abX",), stop_ids=frozenset({EOS})), [*b"ab", EOS])
    assert events == [Event("", 1, token_id=97), Event("", 2, token_id=98), Event("ab", 3, "stop", token_id=EOS)]


def test_ends_at_a_stop_string():
    assert feed(sequence(stop=("bc",)), b"abc")[-1] == Event("", 3, "stop", token_id=99)
    assert feed(sequence(stop=("bc",), max_tokens=3), b"abc")[-1] == Event("", 3, "stop", token_id=99)


def test_a_half_character_at_the_limit_is_flushed():
    assert feed(sequence(max_tokens=1), "é".encode()[:1]) == [Event("\ufffd", 1, "length", token_id=0xC3)]


def test_events_carry_hits_and_logprobs():
    seq = sequence()
    seq.cached_tokens = 16
    logprobs = TokenLogprobs(97, -0.5, ((97, -0.5), (98, -1.5)))
    assert seq.accept(97, logprobs) == Event("a", 1, None, None, 16, logprobs, token_id=97)


def test_which_events_are_last_and_why():
    assert not Event("a", 1).last
    for event, failure in (
        (Event(finish_reason="stop"), None),
        (Event(finish_reason="length"), None),
        (Event(finish_reason="abort"), ABORTED),
        (Event(error=FAILED), FAILED),
    ):
        assert (event.last, event.failure) == (True, failure)
