"""Figures of a benchmark: throughput and p95 over load, and the prefix hit ratio; one line for each kind of server."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.agents_load.config import Numbers
from benchmarks.agents_load.report import grouped
from benchmarks.agents_load.statistics import spread_of

PANELS = (
    ("calls_per_s", "calls / s"),
    ("call_s.p95", "p95 of a call, s"),
    ("session_s.p95", "p95 of a session, s"),
    ("hit_ratio", "prefix hit ratio"),
)
COLORS = {"shared": "tab:blue", "isolated": "tab:orange"}
STYLES = {"this": "-", "against": "--", "": "-"}


def save_figure(path: Path, name: str, runs: Sequence[Numbers]) -> bool:
    """Writes one figure of a config's runs: medians, with a band from the least to the greatest. False if there is only
    one point of load, which gives no line.
    """
    lines = _lines(runs)
    if max((len(line) for line in lines.values()), default=0) < 2:
        return False
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    closed = runs[0]["point"]["at_once"] is not None
    for index, (metric, label) in enumerate(PANELS):
        axes = figure.add_subplot(2, 2, index + 1)
        for title, line in lines.items():
            _draw(axes, title, line, metric)
        axes.set_xlabel("sessions at once" if closed else "arriving sessions / s")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0, top=1 if metric == "hit_ratio" else None)
        axes.grid(alpha=0.3)
        if index == 0:
            axes.legend()
    figure.suptitle(name)
    figure.savefig(path, dpi=120)
    return True


def _lines(runs: Sequence[Numbers]) -> dict[str, list[tuple[float, list[Numbers]]]]:
    """Title -> (load, runs there) in the order of loads."""
    most = max(run["point"]["num_tasks"] for run in runs)
    lines: dict[str, list[tuple[float, list[Numbers]]]] = {}
    for (kind, checkout, _), group in grouped(runs).items():
        point = group[0]["point"]
        load = point["rate"] if point["at_once"] is None else point["at_once"]
        tasks = "" if point["num_tasks"] == most else f" {point['num_tasks']} tasks"
        if load is not None:
            lines.setdefault(f"{kind} {checkout}{tasks}".strip(), []).append((load, group))
    return {title: sorted(line, key=lambda one: one[0]) for title, line in lines.items()}


def _draw(axes, title: str, line: list[tuple[float, list[Numbers]]], metric: str) -> None:  # noqa: ANN001
    found = [(load, spread) for load, group in line if (spread := spread_of(group, metric)) is not None]
    if not found:
        return
    loads, spreads = zip(*found, strict=True)
    kind, _, rest = title.partition(" ")
    style = {"color": COLORS.get(kind), "linestyle": STYLES.get(rest, ":")}
    axes.plot(loads, [spread["median"] for spread in spreads], marker="o", label=title, **style)
    band = [spread["min"] for spread in spreads], [spread["max"] for spread in spreads]
    axes.fill_between(loads, *band, alpha=0.15, color=COLORS.get(kind))
