"""engine/schedule.py alone: who has the next decode turn and the next prefill chunk."""

from dataclasses import dataclass
from typing import Any

import pytest
from serving_fakes import ByteTokenizer, Echo, FakeDecode

from pshare_jax.engine import scoring
from pshare_jax.engine.request import Request
from pshare_jax.engine.schedule import DecodeTurns, PrefillTurns
from pshare_jax.engine.sequence import PrefillProgress, Sequence
from pshare_jax.sampling.params import GREEDY
from pshare_jax.share.boundary import Split
from pshare_jax.text.stop_strings import TextOutput

pytestmark = pytest.mark.host


@dataclass
class Maker:
    """Sequences that have a row in the group of a task."""

    weights: dict[str, Any]

    def __call__(self, name: str, task: str = "t", opened: bool = True, left: int = 0) -> Sequence:
        request = Request(name, task, (1, 2, 3), 10, GREEDY)
        sequence = Sequence(request, TextOutput(ByteTokenizer().detokenizer(), ()), [], Split(2))
        sequence.decode.module, sequence.decode.opened, sequence.decode.has_row = self.weights[task], opened, True
        sequence.prefill = PrefillProgress(context_len=left)
        return sequence


@pytest.fixture
def make() -> Maker:
    return Maker({task: FakeDecode(Echo(task), []) for task in "tuv"})


def ids(rows: list[Sequence]) -> list[str]:
    return [sequence.request.id for sequence in rows]


def play(turns: DecodeTurns, running: list[Sequence], count: int, rows: int = 8) -> list[list[str]]:
    """Who is served in the next turns, if each runs the best candidate."""
    served = []
    for _ in range(count):
        best = turns.order(running, ())[0][:rows]
        turns.served(best)
        served.append(ids(best))
    return served


# --- decode ------------------------------------------------------------------------------------------------------------


def test_groups_take_turns_and_all_rows_of_a_group_share_them(make):
    running = [make("a"), make("b", "u"), make("c"), make("d", "v")]
    assert play(DecodeTurns(), running, 6) == [["a", "c"], ["b"], ["d"], ["a", "c"], ["b"], ["d"]]


def test_adapters_of_one_stack_share_turns_each_with_its_slot(make):
    stacked, other = make.weights["t"], make.weights["u"]
    other.params, other.slot = stacked.params, 2
    running = [make("a"), make("b", "u"), make("c", "v")]
    assert play(DecodeTurns(), running, 4) == [["a", "b"], ["c"], ["a", "b"], ["c"]]
    assert [sequence.slot for sequence in running] == [0, 2, 0]
    scored = [make(name, task, opened=False) for name, task in (("d", "u"), ("e", "t"), ("f", "v"))]
    for sequence in scored:
        sequence.split = Split(1)
    assert ids(scoring.batch_of(scored, {scoring.SHORT})) == ["d", "e"]


def test_nothing_runs_without_sequences():
    assert DecodeTurns().order([], ()) == []


def test_a_group_of_more_rows_than_a_step_serves_the_least_recently_served_first(make):
    running = [make(name) for name in "abcde"]
    assert play(DecodeTurns(), running, 4, rows=2) == [["a", "b"], ["c", "d"], ["e", "a"], ["b", "c"]]


def test_a_new_sequence_joins_at_the_current_turn(make):
    turns, old, other = DecodeTurns(), make("old"), make("other", "u")
    for sequence in (old, other):
        turns.join(sequence)
    assert play(turns, [old, other], 3) == [["old"], ["other"], ["old"]]
    new = make("new", "v")
    turns.join(new)
    assert play(turns, [old, other, new], 3) == [["other"], ["old"], ["new"]]


def test_all_scoring_is_one_group_that_serves_its_sequences_in_turn(make):
    running = [make("a"), *(make(f"s{number}", opened=False) for number in range(3))]
    turns = DecodeTurns()
    assert play(turns, running, 6, rows=1) == [["a"], ["s0"], ["a"], ["s1"], ["a"], ["s2"]]
    assert play(turns, running[1:], 3) == [["s0"], ["s1"], ["s2"]]


def test_sequences_without_a_row_wait(make):
    waits, runs = make("waits"), make("runs")
    waits.decode.has_row = False
    assert [ids(rows) for rows in DecodeTurns().order([waits, runs], ())] == [["runs"]]


def test_a_suspect_decodes_alone(make):
    turns, running = DecodeTurns(), [make("a"), make("b"), make("c")]
    running[1].suspect = "decode", 3
    assert play(turns, running, 4) == [["a", "c"], ["b"], ["a", "c"], ["b"]]
    running[0].suspect = "preemption", 3
    assert play(turns, running, 3) == [["a"], ["c"], ["b"]]


def test_a_suspect_of_another_kind_of_step_decodes_with_others(make):
    running = [make("a"), make("b")]
    running[1].suspect = "prefill", 3
    assert play(DecodeTurns(), running, 1) == [["a", "b"]]


# --- prefill -----------------------------------------------------------------------------------------------------------


def order(turns: PrefillTurns, *ready: Sequence, **ages: int) -> list[str]:
    return ids(turns.order(ready, lambda sequence: ages.get(sequence.request.id, sequence.number)))


def test_short_prompts_go_first_until_they_have_had_a_chunk_of_slots(make):
    turns, long, short = PrefillTurns(16), make("long", left=100), make("short", left=16)
    assert order(turns, long, short) == ["short", "long"]
    turns.ran(first_left=16, num_slots=16)
    assert order(turns, long, short) == ["long", "short"]
    turns.ran(first_left=100, num_slots=16)
    assert order(turns, long, short) == ["short", "long"]
    turns.ran(first_left=3, num_slots=8)
    assert order(turns, long, short) == ["short", "long"]
    turns.ran(first_left=3, num_slots=8)
    assert order(turns, long, short) == ["long", "short"]


def test_the_end_of_a_long_prompt_is_short(make):
    turns = PrefillTurns(16)
    assert [turns.is_short(left) for left in (1, 16, 17)] == [True, True, False]
    assert order(turns, make("longer", left=17), make("ends", left=16)) == ["ends", "longer"]


def test_of_equal_prompts_the_oldest_goes_first_with_the_age_of_those_that_wait_for_it(make):
    first, second, third = (make(name, left=5) for name in ("first", "second", "third"))
    assert order(PrefillTurns(16), third, second, first) == ["first", "second", "third"]
    assert order(PrefillTurns(16), first, second, third, third=-1) == ["third", "first", "second"]


def test_short_prompts_alone_need_no_long_chunk_between_them(make):
    turns = PrefillTurns(16)
    for _ in range(5):
        turns.ran(first_left=16, num_slots=16)
    assert order(turns, make("a", left=3), make("b", left=3)) == ["a", "b"]


def test_a_suspect_is_prefilled_alone(make):
    first, second, third = (make(name, left=5) for name in ("first", "second", "third"))
    second.suspect = "prefill", 0
    assert order(PrefillTurns(16), first, second, third) == ["first", "third"]
    assert order(PrefillTurns(16), second, third) == ["second"]
