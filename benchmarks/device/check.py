"""Runs parts on the device, within a time, and keeps their numbers: after each measurement the JSON is written anew.

A measurement that fails is kept as the end of its traceback, and the next one runs. XLA cannot be interrupted while it compiles,
so what probably takes longer than what is left is skipped, and named.
"""

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.device.cards import Peaks
from benchmarks.device.counts import Work
from benchmarks.device.sizes import Sizes
from pshare_jax.model.config import ModelConfig
from pshare_jax.server.compile_counter import CompileCounter

LAST_LINES = 12
"""Lines of a traceback that are kept."""
LEAST_SECONDS = 10.0
"""What a measurement takes before any has been made: a program is compiled."""
Cell = dict[str, Any]
"""A measurement's name and numbers, as JSON."""
NOT_SHOWN = ("name", "flops", "bytes")
"""Keys that tables and lines leave out: of the last two they have what follows for a device."""


@dataclass
class Clock:
    """The seconds that are left until `end`, in seconds of `time.monotonic`."""

    end: float

    @property
    def left(self) -> float:
        """Seconds left; negative after the end."""
        return self.end - time.monotonic()


@dataclass
class Check:
    """A part's surroundings: the device, what it can do, how large the part is, and where numbers go.

    `peaks` are the device's; `memory` is what JAX may use of it in bytes (None: not known). `model` names the shape of `config`.
    """

    mesh: Mesh
    dtype: str
    sizes: Sizes
    peaks: Peaks
    memory: int | None
    clock: Clock
    model: str
    config: ModelConfig
    say: Callable[[str], None]
    save: Callable[[], None]
    cells: list[Cell] = field(default_factory=list)
    longest: float = 0.0

    @property
    def item(self) -> int:
        """Bytes of a number in the dtype."""
        return jax.numpy.dtype(self.dtype).itemsize

    def fits(self, num_bytes: float) -> bool:
        """Whether the device has room for so many bytes, with a tenth for what programs need besides."""
        return self.memory is None or num_bytes <= 0.9 * self.memory

    def has_room(self, name: str, num_bytes: float) -> bool:
        """`fits`; if not, the measurement of this name is kept as skipped."""
        if not self.fits(num_bytes):
            self.keep({"name": name, "skipped": f"it needs {num_bytes / 2**30:.0f} GiB of memory"})
        return self.fits(num_bytes)

    def measure(self, name: str, make: Callable[[], Cell]) -> Cell | None:
        """Keeps the numbers of a measurement; None if it was skipped or has failed."""
        if self.clock.left < max(self.longest, LEAST_SECONDS):
            self.keep({"name": name, "skipped": "no time is left"})
            return None
        began = time.monotonic()
        try:
            cell = {"name": name, **make()}
        except Exception:
            cell = {"name": name, "error": last_lines()}
        # What it has made must be gone before the next one: an engine has cycles.
        gc.collect()
        self.longest = max(self.longest, time.monotonic() - began)
        self.keep(cell)
        return None if "error" in cell else cell

    def timed(self, seconds: float, work: Work, **numbers: Any) -> Cell:
        """The numbers of something timed that does this work, beside what it would take at the device's peaks."""
        least = self.peaks.least_seconds(work.flops, work.num_bytes)
        return {
            **numbers,
            "ms": seconds * 1e3,
            "limit_ms": None if least is None else least * 1e3,
            "share": None if least is None else least / seconds,
            "flops": work.flops,
            "bytes": work.num_bytes,
        }

    def keep(self, cell: Cell) -> None:
        """Adds numbers that took no measurement, or say why there are none."""
        self.cells.append(cell)
        self.save()
        self.say(f"  {described(cell)}")


def described(cell: Cell) -> str:
    """A cell as a line of text."""
    if "error" in cell:
        return f"{cell['name']}: FAILED: {cell['error'][-1]}"
    if "skipped" in cell:
        return f"{cell['name']}: skipped, {cell['skipped']}"
    shown = (f"{key} {number(value)}" for key, value in cell.items() if key not in NOT_SHOWN and value is not None)
    return f"{cell['name']}: {', '.join(shown)}"


def number(value: Any) -> str:
    """A number for people: four digits, no exponent but for huge and tiny ones."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value and not 1e-3 <= abs(value) < 1e9:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def last_lines() -> list[str]:
    """The end of the traceback of the exception that is being handled."""
    return [line[:500] for line in traceback.format_exc().strip().splitlines()[-LAST_LINES:]]


def run_part(check: Check, part: Callable[[Check], None], counter: CompileCounter) -> Cell:
    """Runs a part; its seconds, what XLA compiled in it, and the error if it failed outside of its measurements."""
    began, programs, compiling = time.monotonic(), counter.count, counter.seconds
    error: Cell = {}
    try:
        part(check)
    except Exception:
        error = {"error": last_lines()}
        check.say(f"  FAILED: {error['error'][-1]}")
    gc.collect()
    return {
        "seconds": round(time.monotonic() - began, 1),
        "programs": counter.count - programs,
        "compile_s": round(counter.seconds - compiling, 1),
        **error,
    }
