"""Tables of a benchmark's runs: medians over the repetitions, and what is divided by what."""

from collections.abc import Iterator, Sequence

from rich.console import Console

from benchmarks import common
from benchmarks.agents_load.config import Numbers
from benchmarks.agents_load.statistics import ratios, spread_of

RATIOS = ("calls_per_s", "tokens_per_s", "call_s.p95", "ttft_s.p95", "session_s.p95")
HEADINGS = ("", "load", "calls/s", "tokens/s", "call s: p50 / p95 / p99", "TTFT s: p50 / p95", "ms a token: p50 / p95")
MORE = ("session s: p50 / p95", "prefilled a session", "hit ratio", "failures")
Key = tuple[str, str, str]
"""Kind of server, checkout, point of load."""


def grouped(runs: Sequence[Numbers]) -> dict[Key, list[Numbers]]:
    """The runs of each server and point, in the order of repetitions."""
    groups: dict[Key, list[Numbers]] = {}
    for run in runs:
        groups.setdefault((run["kind"], run["checkout"], run["point_name"]), []).append(run)
    return {key: sorted(group, key=lambda run: run["repetition"]) for key, group in groups.items()}


def compared(runs: Sequence[Numbers]) -> list[Numbers]:
    """What this benchmark compares: shared / isolated, this checkout / the other, all tasks / fewer tasks."""
    found = []
    for name, upper, lower in _pairs(grouped(runs)):
        values = {path: ratios(upper, lower, path) for path in RATIOS}
        found.append({"name": name, **{path: value for path, value in values.items() if value is not None}})
    return found


def _pairs(groups: dict[Key, list[Numbers]]) -> Iterator[tuple[str, list[Numbers], list[Numbers]]]:
    for (kind, checkout, point), upper in groups.items():
        if kind == "shared" and (lower := groups.get(("isolated", checkout, point))):
            yield f"shared / isolated, {checkout}, {point}", upper, lower
        if checkout == "this" and (lower := groups.get((kind, "against", point))):
            yield f"this / against, {kind}, {point}", upper, lower
        for (other_kind, other_checkout, other_point), lower in groups.items():
            few, many = lower[0]["point"], upper[0]["point"]
            same = (other_kind, other_checkout) == (kind, checkout)
            if same and few["num_tasks"] < many["num_tasks"] and {**few, "num_tasks": 0} == {**many, "num_tasks": 0}:
                yield f"{point} / {other_point}, {kind} {checkout}", upper, lower


def print_tables(console: Console, name: str, runs: Sequence[Numbers]) -> None:
    """The tables of one config."""
    groups = grouped(runs)
    repetitions = max(len(group) for group in groups.values())
    table = common.table(f"{name}: medians of {repetitions} (least to greatest)", (*HEADINGS, *MORE))
    for (kind, checkout, point), group in groups.items():
        failures = sum(sum(run["failures"].values()) + run["unsent_calls"] for run in group)
        table.add_row(
            f"{kind} {checkout}".strip(),
            point,
            _spread(group, "calls_per_s", "{:.3f}"),
            _spread(group, "tokens_per_s", "{:.1f}"),
            _medians(group, ("call_s.p50", "call_s.p95", "call_s.p99"), "{:.2f}"),
            _medians(group, ("ttft_s.p50", "ttft_s.p95"), "{:.2f}"),
            _medians(group, ("token_s.p50", "token_s.p95"), "{:.1f}", 1000),
            _medians(group, ("session_s.p50", "session_s.p95"), "{:.1f}"),
            _prefilled(group),
            _medians(group, ("hit_ratio",), "{:.1%}"),
            f"[red]{failures}[/red]" if failures else "0",
        )
    console.print(table)
    _print_ratios(console, name, runs)
    _print_failures(console, runs)


def _print_ratios(console: Console, name: str, runs: Sequence[Numbers]) -> None:
    rows = compared(runs)
    if not rows:
        return
    headings = ("", "calls/s", "tokens/s", "p95 of a call", "p95 of TTFT", "p95 of a session")
    table = common.table(f"{name}: ratios of the medians (least to greatest by repetition)", headings)
    for row in rows:
        cells = [row.get(path) for path in RATIOS]
        texts = [f"{cell['median']:.2f} ({cell['min']:.2f} to {cell['max']:.2f})" if cell else "-" for cell in cells]
        table.add_row(row["name"], *texts)
    console.print(table)


def _print_failures(console: Console, runs: Sequence[Numbers]) -> None:
    for run in runs:
        for detail in run["failure_details"]:
            where = f"{run['kind']} {run['checkout']} {run['point_name']} #{run['repetition'] + 1}"
            console.print(f"{where}: {detail}", style="red", markup=False)


def _prefilled(group: Sequence[Numbers]) -> str:
    """By usage; what the server's counters say as well, where it is another number."""
    usage = spread_of(group, "prefilled_per_session")
    server = spread_of(group, "server_prefilled_per_session")
    text = "-" if usage is None else f"{usage['median']:,.0f}"
    if usage and server and abs(server["median"] - usage["median"]) >= 1:
        text += f" (server: {server['median']:,.0f})"
    return text


def _spread(group: Sequence[Numbers], path: str, form: str) -> str:
    found = spread_of(group, path)
    if found is None:
        return "-"
    text = form.format(found["median"])
    return text if len(group) == 1 else f"{text} ({form.format(found['min'])} to {form.format(found['max'])})"


def _medians(group: Sequence[Numbers], paths: Sequence[str], form: str, scale: float = 1.0) -> str:
    found = [spread_of(group, path) for path in paths]
    return " / ".join("-" if one is None else form.format(scale * one["median"]) for one in found)
