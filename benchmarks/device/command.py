"""The command line of benchmarks/device_check.py: which parts run, for which models, and where their numbers go."""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.agents_load.machine import machine
from benchmarks.device import agents, attention, decode, handoff, peaks, precision, prefill, sizes, start, training
from benchmarks.device.cards import Peaks, peaks_of
from benchmarks.device.check import Cell, Check, Clock, run_part
from benchmarks.device.report import markdown
from pshare_jax.errors import PshareError
from pshare_jax.mesh import make_mesh
from pshare_jax.server.compile_counter import count_compilations
from pshare_jax.share.model import default_dtype

ROOT = Path(__file__).resolve().parents[2]
PARTS: dict[str, Callable[[Check], None]] = {
    "peaks": peaks.run,
    "precision": precision.run,
    "attention": attention.run,
    "prefill": prefill.run,
    "decode": decode.run,
    "handoff": handoff.run,
    "agents": agents.run,
    "training": training.run,
    "start": start.run,
}
"""The parts in their order: those that take least time first."""
WITHOUT_MODEL = ("peaks", "precision", "attention")
EVERY_MODEL = ("prefill", "decode")
SHARES = {
    "peaks": 0.05,
    "precision": 0.1,
    "attention": 0.12,
    "prefill": 0.1,
    "decode": 0.2,
    "handoff": 0.05,
    "agents": 0.3,
    "training": 0.12,
    "start": 0.1,
}
"""The largest part of the time that a part may take for one model, so that slow compiling leaves time for the others."""
LEAST_SECONDS = 30.0
"""What each part may take of a short run."""
MINUTES = 8.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 if something has failed, 2 after a mistake."""
    options = _parser().parse_args(arguments)
    try:
        if options.table is not None:
            print(markdown(json.loads(options.table.read_text())))
            return 0
        return Run(options).run()
    except PshareError as error:
        print(f"device_check: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/device_check.py",
        description="Measures this checkout on JAX's first device, with random weights; docs/benchmarks.md says what.",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all by default")
    parser.add_argument("--models", nargs="+", choices=sizes.FULL.models, help="all by default, as far as they fit")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="what no longer fits is skipped (8)")
    parser.add_argument(
        "--json", type=Path, help="file of the numbers; by default docs/device/CARD.json, on a CPU none"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device: whether all parts run")
    parser.add_argument("--table", type=Path, metavar="JSON", help="only print the tables of such a file, as Markdown")
    return parser


class Run:
    """A run of the command on the first device."""

    def __init__(self, options: argparse.Namespace):
        """Raises `PshareError` if there is no accelerator for models of full size."""
        self._device, self._mesh = jax.devices()[0], make_mesh([0])
        on_cpu = self._device.platform == "cpu"
        if on_cpu and not options.tiny:
            raise PshareError("JAX has no accelerator here; use --tiny to see whether all parts run.")
        if on_cpu:
            # Its numbers say nothing, so that it need not be fast.
            jax.config.update("jax_disable_most_optimizations", True)
        self._began = time.monotonic()
        self._seconds = 60 * options.minutes
        self._sizes = sizes.TINY if options.tiny else sizes.FULL
        self._models = self._sizes.models if options.tiny else tuple(options.models or self._sizes.models)
        self._peaks = peaks_of(self._device.device_kind)
        unknown = self._peaks.flops is None
        self._parts = [name for name in PARTS if name in options.parts or (name == "peaks" and unknown)]
        self._counter = count_compilations()
        self._results = {
            **head(self._device, self._peaks),
            "tiny": options.tiny,
            "minutes": options.minutes,
            "parts": [],
        }
        self._file: Path | None = options.json
        if self._file is None and not on_cpu:
            self._file = ROOT / "docs" / "device" / f"{slug(self._device.device_kind)}.json"

    def run(self) -> int:
        """All parts; the exit status."""
        self._say(
            f"{self._device.device_kind}, JAX {jax.__version__}, numbers go to {self._file or 'the output alone'}"
        )
        for name, model in self._items():
            self._run_part(name, model)
        print(markdown(self._results), flush=True)
        return int(any("error" in cell for part in self._results["parts"] for cell in (part, *part["cells"])))

    def _items(self) -> Iterator[tuple[str, str]]:
        """(part, model): all parts of the first model, then what is measured of every model."""
        first, *others = self._models
        yield from ((name, first) for name in self._parts)
        yield from ((name, model) for model in others for name in self._parts if name in EVERY_MODEL)

    def _run_part(self, name: str, model: str) -> None:
        alone = name in WITHOUT_MODEL
        part: dict[str, Any] = {"part": name, "model": None if alone else model, "cells": []}
        self._results["parts"].append(part)
        self._say(name if alone else f"{name}, {model}")
        left = self._began + self._seconds - time.monotonic()
        clock = Clock(time.monotonic() + min(left, max(SHARES[name] * self._seconds, LEAST_SECONDS)))
        check = Check(
            self._mesh,
            default_dtype(self._mesh),
            self._sizes,
            self._peaks,
            memory_of(self._device),
            clock,
            model,
            sizes.shape(model),
            self._say,
            self._save,
            part["cells"],
        )
        if clock.left < 0:
            part["skipped"] = "no time is left"
            self._say("  skipped, no time is left")
        else:
            part.update(run_part(check, PARTS[name], self._counter))
        self._peaks = check.peaks
        self._results["limits"] = {"flops": self._peaks.flops, "bytes_s": self._peaks.bandwidth}
        self._save()

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", flush=True)

    def _save(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_name(self._file.name + ".part")
        part.write_text(json.dumps(self._results, indent=1) + "\n")
        part.replace(self._file)


def head(device: Any, known: Peaks) -> Cell:
    """What was measured with what: the device, versions, the commit."""
    memory = memory_of(device)
    return {
        "card": device.device_kind,
        "platform": device.platform,
        "devices": len(jax.devices()),
        "memory_gib": None if memory is None else round(memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "platform_version": getattr(device.client, "platform_version", None),
        "machine": machine(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "date": time.strftime("%Y-%m-%d"),
        "limits": {"flops": known.flops, "bytes_s": known.bandwidth},
    }


def memory_of(device: Any) -> int | None:
    """Bytes that JAX may use of an accelerator; None where it does not say, and on a CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return (stats or {}).get("bytes_limit")


def slug(kind: str) -> str:
    """A device's kind as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def _output(*command: str) -> str | None:
    """The first line that a program prints; None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
