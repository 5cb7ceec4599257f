"""What fails when something fails: every stage of a request's life x every kind of fault, on real engines of a tiny model.

    python benchmarks/faults.py [--rounds N] [--out FILE] [--markdown FILE]      (or python -m benchmarks.faults)

In each cell (fault_cells.py) eight concurrent requests of three tasks run on an engine that is stepped in turn. One fault
happens to the first request that reaches the cell's stage (fault_points.py); then everything runs to the end
(fault_runs.py). Answers must be those of the plain loop, token by token. A round is a seed, and repeats itself. The models
are made by tests/helpers, which is put on the path. The exit status is 1 if a fault reached further than it may.
"""

# ruff: noqa: E402 (the path is set first)

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests" / "helpers")) if path not in sys.path]

import pshare_jax
from benchmarks import common
from benchmarks.fault_cells import FAULTS, PLACEMENTS, STAGES, cells, may_fail, why_not
from benchmarks.fault_runs import World, play

SUMS = ("requests", "wrong_tokens", "out_of_order", "failed_untouched", "pages_lost")
MOSTS = ("touched", "failed", "failed_others", "deaths", "shapes_given_up", "turns", "seconds")
Result = dict[str, Any]


def violations(result: Result) -> list[str]:
    """What must not be in the result of a cell."""
    placement, stage, fault = result["placement"], result["stage"], result["fault"]
    wrong = [f"{name}: {result[name]}" for name in SUMS[1:] if result[name]]
    wrong += result["unexpected"]
    if not result["fired"]:
        wrong.append("no request reached the stage")
    allowed = may_fail(placement, stage, fault)
    if (allowed == "none" and result["failed"]) or (allowed == "victim" and result["failed_others"]):
        wrong.append(f"failed: {result['failed']}, but at most: {allowed}")
    # An error of the page books ends the thread, too.
    dies = fault.startswith("thread death") or (fault == "exception" and stage in ("admission", "start of decoding"))
    if result["deaths"] and not dies:
        wrong.append(f"threads that died: {result['deaths']}")
    return wrong


def play_all(world: World, num_rounds: int, note: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """The results of all cells in each round."""
    results = []
    for seed in range(num_rounds):
        for cell in cells(seed=seed):
            results.append(play(world, cell))
            note(results[-1])
    return results


def summary(results: list[Result]) -> dict[str, Any]:
    """Totals, and each cell over all rounds: sums, and the most of what is counted in one run."""
    merged: dict[tuple[str, str, str], Result] = {}
    for result in results:
        names = result["placement"], result["stage"], result["fault"]
        cell = merged.setdefault(names, dict(zip(("placement", "stage", "fault"), names, strict=True)))
        for name in SUMS:
            cell[name] = cell.get(name, 0) + result[name]
        for name in MOSTS:
            cell[name] = max(cell.get(name, 0), result[name])
    totals = {"runs": len(results), "cells": len(merged)} | {name: sum(r[name] for r in results) for name in SUMS}
    return {"totals": totals, "cells": list(merged.values()), "not_run": not_run()}


def not_run() -> dict[str, list[str]]:
    """Reason -> the cells that are not run for it, in all placements in which that is so."""
    reasons: dict[str, list[str]] = {}
    for stage in STAGES:
        for fault in FAULTS:
            if (reason := why_not("split", stage, fault)) is not None:
                reasons.setdefault(reason, []).append(f"{stage}: {fault}")
    return reasons


# --- tables ---------------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{fault: (fault, tuple(PLACEMENTS)) for fault in FAULTS if fault != "thread death for good"},
    "death for good, no other worker": ("thread death for good", ("split", "colocated")),
    "death for good, another worker": ("thread death for good", ("2 + 2",)),
}
"""Heading -> fault and placements."""


def rows(numbers: dict[str, Any]) -> list[list[str]]:
    """For each stage and column the most in any run: requests failed / other requests queued again / turns."""
    table = []
    for stage in STAGES:
        row = [stage]
        for fault, placements in COLUMNS.values():
            found = [
                c
                for c in numbers["cells"]
                if (c["stage"], c["fault"]) == (stage, fault) and c["placement"] in placements
            ]
            most = {name: max((cell[name] for cell in found), default=0) for name in ("failed", "touched", "turns")}
            row.append(f"{most['failed']} / {max(most['touched'] - 1, 0)} / {most['turns']}" if found else "")
        table.append(row)
    return table


def markdown(numbers: dict[str, Any]) -> str:
    """The tables of docs/reliability.md."""
    totals = numbers["totals"]
    lines = [
        "| runs | requests | wrong tokens | events out of order | failed untouched | pages not back |",
        "|---|---|---|---|---|---|",
        f"| {totals['runs']:,} | " + " | ".join(f"{totals[name]:,}" for name in SUMS) + " |",
        "",
        "| stage | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *("| " + " | ".join(row) + " |" for row in rows(numbers)),
    ]
    return "\n".join(lines) + "\n"


def report(numbers: dict[str, Any]) -> None:
    """Prints the tables."""
    table = common.table("failed / others queued again / turns until the clients know, at most", ["stage", *COLUMNS])
    for row in rows(numbers):
        table.add_row(*row)
    Console(width=240).print(table)
    print(", ".join(f"{name.replace('_', ' ')}: {number}" for name, number in numbers["totals"].items()))


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    import jax

    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1, help="times that each cell is run, in other orders")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--markdown", type=Path, help="write the tables of docs/reliability.md to this file")
    options = parser.parse_args(arguments)
    pshare_jax.virtual_cpu_devices(8)
    # Compiled quickly: speed is not what is measured.
    jax.config.update("jax_disable_most_optimizations", True)
    logging.getLogger("pshare_jax").setLevel(logging.CRITICAL)
    wrong: list[str] = []

    def note(result: Result) -> None:
        names = [result[name] for name in ("placement", "stage", "fault", "seed")]
        wrong.extend(f"{names}: {found}" for found in violations(result))

    with tempfile.TemporaryDirectory() as folder:
        numbers = summary(play_all(World(Path(folder)), options.rounds, note))
    report(numbers)
    if options.out:
        options.out.write_text(json.dumps(numbers).replace("}, {", "},\n{") + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(numbers))
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
