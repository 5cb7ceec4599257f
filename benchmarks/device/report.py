"""The numbers of a run as Markdown tables: what was measured, beside what it would take at a device's peaks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.device.cards import COMPARED, peaks_of
from benchmarks.device.check import NOT_SHOWN, Cell, number

_HEADINGS = {
    "ms": "ms",
    "limit_ms": "limit ms",
    "share": "limit / measured",
    "mfu": "MFU",
    "tokens_s": "tokens/s",
    "calls_s": "calls/s",
    "gb_s": "GB/s",
    "tflops": "TFLOP/s",
    "call_p50_s": "call p50 s",
    "call_p95_s": "call p95 s",
    "ttft_p50_s": "TTFT p50 s",
    "ttft_p95_s": "TTFT p95 s",
    "calls_of": "of",
    "wall_s": "seconds",
    "cpu_loss": "loss on CPU",
    "worst_relative": "worst loss off by",
    "norm_relative": "gradient's norm off by",
}
_PERCENT = ("share", "mfu", "worst_relative", "norm_relative")
NONE = "-"


def markdown(results: Mapping[str, Any]) -> str:
    """All parts of a run's JSON."""
    names: list[str] = []
    for part in results["parts"]:
        if part["part"] not in names:
            names.append(part["part"])
    blocks = [_head(results)]
    for name in names:
        blocks += _part(name, [part for part in results["parts"] if part["part"] == name])
    return "\n\n".join(blocks)


def _head(results: Mapping[str, Any]) -> str:
    machine, limits = results["machine"], results["limits"]
    peaks = "unknown peaks"
    if limits["flops"] is not None:
        peaks = f"peaks {limits['flops'] / 1e12:.4g} TFLOP/s and {limits['bytes_s'] / 1e9:.4g} GB/s"
    about = [f"**{results['card']}**", peaks]
    if results["memory_gib"] is not None:
        about.append(f"{results['memory_gib']} GiB for JAX")
    if results["driver"]:
        about.append(f"driver {results['driver']}")
    about.append(f"JAX {machine['packages']['jax']}")
    if results["commit"]:
        about.append(f"commit {results['commit']}")
    about.append(results["date"])
    note = " Sizes are tiny: the numbers say nothing." if results["tiny"] else ""
    return f'{", ".join(about)}.{note} "Limit" is the longer of the times that FLOPs and bytes take at the peaks.'


def _part(name: str, parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of a part, of all models, and what was skipped or has failed."""
    cells = [(part["model"], cell) for part in parts for cell in part["cells"]]
    good = [(model, cell) for model, cell in cells if not {"error", "skipped"} & set(cell)]
    blocks = [f"### {name}"]
    if good:
        blocks.append(_table(good))
    notes = [
        f"{_named(part['model'], name)}: {part['seconds']:.0f} s, {part['programs']} programs compiled in "
        f"{part['compile_s']:.0f} s"
        for part in parts
        if "seconds" in part
    ]
    notes += [_fault(_named(part["model"], name), part) for part in parts if {"error", "skipped"} & set(part)]
    notes += [_fault(_named(model, cell["name"]), cell) for model, cell in cells if {"error", "skipped"} & set(cell)]
    return [*blocks, "\n".join(f"- {note}" for note in notes)] if notes else blocks


def _named(model: str | None, name: str) -> str:
    return name if model is None else f"{name}, {model}"


def _fault(name: str, what: Mapping[str, Any]) -> str:
    return f"{name}: FAILED: {what['error'][-1]}" if "error" in what else f"{name}: skipped, {what['skipped']}"


def _table(cells: Sequence[tuple[str | None, Cell]]) -> str:
    keys = list(dict.fromkeys(key for _, cell in cells for key in cell if key not in NOT_SHOWN))
    timed = any("flops" in cell for _, cell in cells)
    modelled = any(model is not None for model, _ in cells)
    headings = [*(["model"] if modelled else []), "", *(_HEADINGS.get(key, key) for key in keys)]
    headings += [f"limit {name} ms" for name in COMPARED] if timed else []
    lines = [_line(headings), _line("---" if heading in ("model", "") else "---:" for heading in headings)]
    for model, cell in cells:
        texts = [*([str(model)] if modelled else []), cell["name"], *(_shown(key, cell.get(key)) for key in keys)]
        lines.append(_line([*texts, *(_limits(cell) if timed else [])]))
    return "\n".join(lines)


def _limits(cell: Cell) -> list[str]:
    """What the same work takes at least on the devices that are compared."""
    if "flops" not in cell:
        return [NONE] * len(COMPARED)
    found = (peaks_of(kind).least_seconds(cell["flops"], cell["bytes"]) for kind in COMPARED.values())
    return [NONE if seconds is None else number(1e3 * seconds) for seconds in found]


def _shown(key: str, value: Any) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.3g} %" if key in _PERCENT else number(value)


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"
