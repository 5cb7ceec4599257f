"""The numbers of benchmarks/agents.py: percentiles, medians over repetitions, ratios and what is compared."""

import io

import pytest
from rich.console import Console

from benchmarks.agents_load.client import CallRecord
from benchmarks.agents_load.config import BenchConfig, Point, targets_of
from benchmarks.agents_load.report import compared, grouped, print_tables
from benchmarks.agents_load.runner import Run, SessionRecord
from benchmarks.agents_load.statistics import percentiles, ratios, spread_of, summarize
from benchmarks.agents_load.workload import Call

pytestmark = pytest.mark.host

CALL = Call("m", (1,) * 100, 5)


def record(session, began, ended, **fields):
    usage = {"prompt_tokens": 100, "cached_tokens": 60, "completion_tokens": 5}
    return CallRecord(session, CALL, began, began + 1, ended, [0.5, 0.25], **{**usage, **fields})


def test_percentiles_interpolate():
    assert percentiles([]) is None
    assert percentiles([4, 1, 3, 2, 0]) == pytest.approx({"p50": 2, "p95": 3.8, "p99": 3.96, "mean": 2})


def test_a_run_in_numbers():
    run = Run(10.0, [record("a", 10.0, 13.0), record("a", 14.0, 20.0)], [SessionRecord("a", 10.0, 20.0)])
    numbers = summarize(run)
    assert (numbers["duration_s"], numbers["calls"], numbers["calls_per_s"], numbers["tokens_per_s"]) == (10, 2, 0.2, 1)
    assert (numbers["prefilled_tokens"], numbers["hit_ratio"]) == (2 * 39, 0.6)
    # After the first token, at 1 s, four more.
    assert numbers["token_s"]["mean"] == pytest.approx((2 / 4 + 5 / 4) / 2)
    assert (numbers["call_s"]["p50"], numbers["ttft_s"]["p50"], numbers["gap_s"]["p50"]) == (4.5, 1, 0.375)
    assert numbers["session_s"]["p99"] == 10
    assert (numbers["failures"], numbers["failed_sessions"], numbers["unsent_calls"]) == ({}, 0, 0)


def test_failed_sessions_have_no_latency_but_take_their_time():
    failed = record("b", 12.0, 30.0, failure="timeout")
    sessions = [SessionRecord("a", 10.0, 13.0), SessionRecord("b", 12.0, 30.0, 4)]
    numbers = summarize(Run(10.0, [record("a", 10.0, 13.0), failed], sessions))
    assert (numbers["calls"], numbers["duration_s"], numbers["session_s"]["mean"]) == (1, 20, 3)
    assert (numbers["failures"], numbers["unsent_calls"]) == ({"timeout": 1}, 4)


def test_spread_and_ratios():
    runs, others = [{"x": {"y": value}} for value in (3, 9, 6)], [{"x": {"y": value}} for value in (2, 3, 4)]
    assert spread_of(runs, "x.y") == {"median": 6, "min": 3, "max": 9, "values": [3, 9, 6]}
    assert ratios(runs, others, "x.y") == {"median": 2, "min": 1.5, "max": 3}
    assert spread_of([*runs, {"x": None}], "x.y") is None
    assert ratios(runs, [{"x": None}], "x.y") is None


def measured(kind, checkout, tasks, repetition, calls_per_s, at_once=4):
    run = summarize(Run(0.0, [record("a", 0.0, 2.0)], [SessionRecord("a", 0.0, 2.0)]))
    point = {"at_once": at_once, "rate": None, "num_tasks": tasks}
    name = Point(at_once, None, tasks).name
    head = {"kind": kind, "checkout": checkout, "point": point, "point_name": name, "repetition": repetition}
    return {**run, **head, "calls_per_s": calls_per_s, "prefilled_per_session": 39.0}


def test_what_is_compared_with_what():
    """Shared with isolated, this with the other checkout, all tasks with fewer; never two loads."""
    speeds = {("shared", "this"): 6, ("shared", "against"): 4, ("isolated", "this"): 3, ("isolated", "against"): 1}
    runs = [measured(*key, 4, i, speed + i) for key, speed in speeds.items() for i in (1, 0)]
    found = {row["name"]: row["calls_per_s"]["median"] for row in compared(runs)}
    assert found == {
        "shared / isolated, this, 4 at once, 4 tasks": 6.5 / 3.5,
        "shared / isolated, against, 4 at once, 4 tasks": 4.5 / 1.5,
        "this / against, shared, 4 at once, 4 tasks": 6.5 / 4.5,
        "this / against, isolated, 4 at once, 4 tasks": 3.5 / 1.5,
    }
    assert [run["repetition"] for run in grouped(runs)["shared", "this", "4 at once, 4 tasks"]] == [0, 1]
    tasks = [measured("shared", "this", num, 0, num, at_once) for num in (1, 4) for at_once in (1, 4)]
    assert {row["name"]: row["calls_per_s"]["median"] for row in compared(tasks)} == {
        "1 at once, 4 tasks / 1 at once, 1 task, shared this": 4,
        "4 at once, 4 tasks / 4 at once, 1 task, shared this": 4,
    }


def test_the_other_checkout_runs_what_the_config_says():
    config = BenchConfig(against=["shared"])
    assert targets_of(config, ["this"]) == {"shared": ["this"], "isolated": ["this"]}
    assert targets_of(config, ["this", "against"]) == {"shared": ["this", "against"], "isolated": ["this"]}
    assert targets_of(BenchConfig(urls={"x": "http://x/v1"}), ["this", "against"]) == {"x": [""]}


def test_tables_show_failures_and_other_counts():
    run = {**measured("shared", "this", 4, 0, 1.0), "server_prefilled_per_session": 50.0}
    run |= {"failures": {"timeout": 2}, "unsent_calls": 5, "failure_details": ["timeout: not ended after 1 s"]}
    text = io.StringIO()
    print_tables(Console(file=text, width=250), "w", [run])
    assert "39 (server: 50)" in text.getvalue()
    assert "│        7 │" in text.getvalue()
    assert "timeout: not ended after 1 s" in text.getvalue()
