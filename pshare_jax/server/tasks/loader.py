"""A decode module's folder -> weights on the meshes of decode workers, with every program compiled that their steps call.

task_table.py calls it in its own thread, beside the workers': it touches no pool and nothing of theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pshare_jax.engine.engine import Engine
from pshare_jax.engine.warmup import decode_variants
from pshare_jax.share.decode_module import DecodeModule, load_module


class TaskLoader:
    """Loads decode modules for an engine."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def load(self, folder: Path, workers: Sequence[int], check: Callable[[], None]) -> dict[int, DecodeModule]:
        """The module on each of the workers' devices; `check` may raise to give up.

        Raises:
            PshareError: the module does not fit the base.
        """
        modules: dict[int, DecodeModule] = {}
        for worker in workers:
            modules[worker] = load_module(folder, self._engine.decode_specs[worker].base)
            check()
        for worker, module in modules.items():
            self._compile(worker, module, check)
        return modules

    def _compile(self, worker: int, module: DecodeModule, check: Callable[[], None]) -> None:
        """What is compiled already, for a task of the same architecture, takes no time."""
        compiled = self._engine.decode_workers[worker].compiled
        spec = replace(self._engine.decode_specs[worker], tasks={"": module})
        for program in decode_variants(spec, self._engine):
            # Also shapes that are not used yet while the start still compiles: they must not come before this.
            if program.shape is not None and compiled.may_be_used(program.shape):
                program.lower().compile()
                check()
