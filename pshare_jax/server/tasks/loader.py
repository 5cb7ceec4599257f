"""Loads a decode module's folder onto the meshes of decode workers, and compiles every program that their steps call: none
for a LoRA adapter that fits into the stack of its mesh.

table.py calls it in a thread of its own, while workers run: it touches neither pools nor the workers' state.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import Module
from pshare_jax.engine.warmup import decode_variants
from pshare_jax.share.decode_module import DecodeModule, load_module
from pshare_jax.text.chat_style import ChatStyle


class TaskLoader:
    """Loads decode modules for an engine."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def load(
        self, folder: Path, workers: Sequence[int], check: Callable[[], None]
    ) -> tuple[dict[int, Module], ChatStyle]:
        """The module on the devices of each worker, and its chat style; `check` is called between steps and may raise to
        cancel.

        Raises:
            PshareError: the module does not fit the base.
        """
        style, placed = ChatStyle(), {}
        for worker in workers:
            spec = self._engine.decode_specs[worker]
            module = load_module(folder, spec.base)
            style = module.style
            placed[worker] = spec.stack.place({folder.name: module}, self._engine.modules_in_use(worker))
            check()
        for worker, new in placed.items():
            self._compile(worker, new.as_run(folder.name), check)
        specs = self._engine.decode_specs
        return {worker: specs[worker].stack.publish(new)[folder.name] for worker, new in placed.items()}, style

    def _compile(self, worker: int, module: DecodeModule, check: Callable[[], None]) -> None:
        """Programs of a task with the same architecture are compiled already and take no time."""
        compiled = self._engine.decode_workers[worker].compiled
        spec = replace(self._engine.decode_specs[worker], tasks={"": module})
        for program in decode_variants(spec, self._engine):
            # Also shapes that startup is still compiling: workers must not use them before this module's programs.
            if program.shape is not None and compiled.may_be_used(program.shape):
                program.lower().compile()
                check()
