"""No fault reaches further than it must: the cells of benchmarks/faults.py on real tiny engines.

Default: every stage with every fault in one placement, about 1,000 requests. Slow: all cells in four orders, over 10,000.
"""

import json
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault_cells import FAULTS, PLACEMENTS, STAGES, Cell, cells, why_not
from benchmarks.fault_runs import World, play

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults"))


def one_placement_each() -> list[Cell]:
    """Each stage with each fault that exists there, in the placements in turn."""
    chosen = []
    for stage in STAGES:
        for fault in FAULTS:
            able = [placement for placement in PLACEMENTS if why_not(placement, stage, fault) is None]
            if able:
                chosen.append(Cell(able[len(chosen) % len(able)], stage, fault))
    return chosen


def check(world: World, chosen: list[Cell], least: int) -> None:
    """Nothing wrong in any cell, over at least so many requests."""
    results = [play(world, cell) for cell in chosen]
    wrong = {(r["placement"], r["stage"], r["fault"], r["seed"]): faults.violations(r) for r in results}
    assert {names: found for names, found in wrong.items() if found} == {}
    totals = faults.summary(results)["totals"]
    print(totals)
    assert totals["requests"] >= least
    assert [totals[name] for name in ("wrong_tokens", "out_of_order", "failed_untouched", "pages_lost")] == [0] * 4


def test_every_stage_with_every_fault(world, caplog):
    caplog.set_level("CRITICAL", "pshare_jax")
    check(world, one_placement_each(), 300)


@pytest.mark.parametrize(
    "cell",
    [
        # The scoring step of a begun answer was not read: its failure was blamed on the next decode step's requests.
        Cell("colocated", "scoring step", "late failure each time", 2),
        # Two requests, each a waiter of the other in another pool, made each other restart for ever.
        Cell("split", "return: arrival", "late failure each time", 5),
    ],
    ids=str,
)
def test_cells_that_found_a_bug(world, caplog, cell):
    caplog.set_level("CRITICAL", "pshare_jax")
    assert faults.violations(play(world, cell)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_all_cells_in_other_orders(world, caplog, seed):
    caplog.set_level("CRITICAL", "pshare_jax")
    check(world, cells(seed=seed), 3_000)


def test_a_run_repeats_itself(world, caplog):
    caplog.set_level("CRITICAL", "pshare_jax")
    cell = Cell("split", "arrival", "late failure", 3)
    first, second = ({**play(world, cell), "seconds": 0} for _ in "ab")
    assert first == second


def test_a_fault_that_reaches_too_far_is_seen(world):
    right = play(world, Cell("split", "decode step", "duplicate"))
    assert faults.violations(right) == []
    for change in ({"failed": 1}, {"wrong_tokens": 1}, {"pages_lost": 2}, {"deaths": 1}, {"fired": 0}):
        assert len(faults.violations(right | change)) == 1


def test_the_documented_tables_are_those_of_the_stored_run():
    stored = json.loads((DOCS / "faults.json").read_text())
    assert faults.markdown(stored) in (DOCS / "reliability.md").read_text()
    assert [stored["totals"][name] for name in ("wrong_tokens", "failed_untouched", "pages_lost")] == [0] * 3
