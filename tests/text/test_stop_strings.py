"""output.py: stop strings in a stream (cases A1-10, A1-12, A1-13, A1-15)."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_fakes import ByteDetokenizer

from pshare_jax.text.stop_strings import StopMatcher, TextOutput

pytestmark = pytest.mark.host


def stream(text, stops, size=1):
    matcher = StopMatcher(stops)
    pieces = []
    for start in range(0, len(text), size):
        pieces.append(matcher.push(text[start : start + size]))
        if matcher.stopped:
            break
    return [*pieces, matcher.flush()], matcher.stopped


def truncated(text, stops):
    """The text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def test_nothing_of_the_stop_string_leaks():
    assert stream("ABCDEFGH", ["CDEFG"]) == (["A", "B", "", "", "", "", "", ""], True)


def test_what_was_held_comes_when_it_is_no_stop():
    pieces, stopped = stream("ABCDEFGH", ["CDEX"])
    assert pieces == ["A", "B", "", "", "", "CDEF", "G", "H", ""]
    assert not stopped


def test_what_was_held_comes_at_the_end():
    assert stream("ABCDE", ["CDEX"])[0][-1] == "CDE"


def test_a_stop_that_never_comes_holds_nothing():
    pieces, _ = stream("hello world", ["z" * 40])
    assert pieces[:-1] == list("hello world")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4), st.integers(1, 5))
def test_pieces_are_the_truncated_text(text, stops, size):
    pieces, stopped = stream(text, stops, size)
    assert "".join(pieces) == truncated(text, stops)
    assert stopped == (truncated(text, stops) != text or any(text.endswith(stop) for stop in stops))


@given(
    st.lists(st.text("ab", max_size=5), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=6),
    st.integers(0, 8),
)
def test_a_stop_string_must_end_after_the_texts_that_may_not_stop(texts, stops, first):
    """As a whole text: the first end of any stop string behind the first texts, wherever it begins."""
    matcher, pieces = StopMatcher(stops), []
    for index, text in enumerate(texts):
        pieces.append(matcher.push(text, may_stop=index >= first))
    whole = "".join(texts)
    free = len("".join(texts[:first]))
    ends = [
        (end, end - len(stop))
        for end in range(free + 1, len(whole) + 1)
        for stop in stops
        if whole[:end].endswith(stop)
    ]
    assert "".join([*pieces, matcher.flush()]) == (whole[: min(ends)[1]] if ends else whole)
    assert matcher.stopped == bool(ends)


def test_many_and_long_stop_strings_cost_little():
    """The work per character does not grow with the matched length, and nothing is prepared for unmatched text."""
    stops = ["a" * 1_000_000 + str(index) for index in range(64)]
    began = time.perf_counter()
    matcher = StopMatcher(stops)
    assert time.perf_counter() - began < 0.1
    for _ in range(20):
        assert matcher.push("a" * 100) == ""
    began = time.perf_counter()
    assert matcher.push("b") == "a" * 2000 + "b"
    assert time.perf_counter() - began < 0.5


EMOJI = "😀".encode()


@pytest.mark.parametrize("cut", range(1, 5))
def test_a_character_cut_in_half_is_flushed_once(cut):
    output = TextOutput(ByteDetokenizer(), [])
    pieces = [output.push(byte) for byte in EMOJI[:cut]]
    text = "".join(pieces) + output.finish()
    assert text == EMOJI[:cut].decode(errors="replace")
    assert "\ufffd" not in "".join(pieces)
