"""Factorise a model (PrefillShare, arXiv 2602.12029): a frozen prefill module computes KV, and decode modules read it.

`factorize` returns a `SharedModel` for notebooks, tests and offline use. The engine takes the same two halves: a
`PrefillModule` for each prefill worker and a `TaskModules` for each decode worker.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pshare_jax.errors import PshareError
from pshare_jax.mesh import same_devices
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.kv.dense import DenseKV, bucket
from pshare_jax.model.sharding import kv_sharding
from pshare_jax.share.boundary import Split
from pshare_jax.share.decode_module import DecodeModule, Prefill, load_module
from pshare_jax.share.model import Model, checked_tokens

CHUNK = 512
"""Most tokens of one prefill step; bounds the number of compiled shapes and the memory of attention scores."""


class PrefillModule:
    """The base on one mesh: turns tokens into KV, uses no head and never samples."""

    def __init__(self, model: Model, mesh: Mesh | None = None):
        self.model = model if mesh is None else model.on(mesh)

    def prefill(self, tokens: Any, kv: DenseKV | None = None) -> DenseKV:
        """KV of int tokens `[B, T]` (T may be 0) that follow those in `kv`, if given; `kv` itself stays usable."""
        tokens = checked_tokens(tokens, self.model.config)
        kv = self._empty(tokens.shape[0]) if kv is None else kv
        check_fits(tokens, kv, self.model.config)
        if tokens.shape[1] == 0:
            return kv.copy()
        for start in range(0, tokens.shape[1], CHUNK):
            kv = self._chunk(tokens[:, start : start + CHUNK], kv)
        return kv

    def _empty(self, batch: int) -> DenseKV:
        config = self.model.config
        shape = (batch, config.num_kv_heads, bucket(0), config.head_dim)
        sharding = kv_sharding(config, self.model.mesh)

        def zeros() -> jax.Array:
            return jnp.zeros(shape, self.model.architecture.dtype, device=sharding)

        # Separate arrays, because a donating decode step writes each in place.
        return DenseKV(tuple((zeros(), zeros()) for _ in config.layers), 0)

    def _chunk(self, tokens: np.ndarray, kv: DenseKV) -> DenseKV:
        padded = padded_tokens(tokens)
        length = kv.length + tokens.shape[1]
        if kv.length == 0:
            return DenseKV(self.model.steps.prefill(self.model.params, padded), length)
        kv = kv.grown(kv.length + padded.shape[1])
        layers = self.model.steps.extend(self.model.params, padded, jnp.int32(kv.length), kv.layers)
        return DenseKV(layers, length)


class TaskModules:
    """All tasks of one decode mesh. Tasks that use the base's weights share one copy of them.

    `prefill` says which KV the tasks read: the base's, or each task's own (the isolated baseline).
    """

    def __init__(self, model: Model, mesh: Mesh | None = None, prefill: Prefill = "base"):
        self.model = model if mesh is None else model.on(mesh)
        self._prefill: Prefill = prefill
        self._tasks: dict[str, DecodeModule] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order of addition."""
        return tuple(self._tasks)

    def add_task(self, name: str, source: str | Path | DecodeModule) -> None:
        """Add a task: "base", a decode module's folder, or a `DecodeModule` on this mesh.

        Raises:
            PshareError: the name is empty or taken, or `load_module` refuses the folder.
        """
        if not name:
            raise PshareError("the task name must not be empty.")
        if name in self._tasks:
            raise PshareError(f"the task '{name}' exists already; choose another name.")
        self._tasks[name] = self._module(source)

    def module(self, task: str) -> DecodeModule:
        """The task's decode module; the error for an unknown name lists the known tasks."""
        if task not in self._tasks:
            raise PshareError(f"there is no task '{task}'; known tasks: {', '.join(self._tasks) or 'none'}.")
        return self._tasks[task]

    def transfer(self, kv: DenseKV) -> DenseKV:
        """A copy of KV from the prefill mesh in this mesh's sharding, made by one `jax.device_put`."""
        sharding = kv_sharding(self.model.config, self.model.mesh)
        # On the same devices, donating either of two aliases would delete both.
        return replace(kv, layers=jax.device_put(kv.layers, sharding, may_alias=False))

    def decode(
        self, task: str, tokens: Any, kv: DenseKV, *, donate: bool = False, active: bool = True
    ) -> tuple[Float[Array, "B T V"], DenseKV]:
        """Feed int tokens `[B, T]`, T >= 1, after `kv` to the task's module: all positions' logits and the extended KV.

        With `donate` the memory of `kv` is written in place, so `kv` must not be used again; without, it is copied. An
        activated LoRA that is not `active` leaves the tokens to the base's weights.
        """
        module = self.module(task)
        module = module if active else module.base or module
        tokens = checked_tokens(tokens, self.model.config)
        if tokens.shape[1] == 0:
            raise PshareError("decode needs at least one token for each row.")
        check_fits(tokens, kv, self.model.config)
        length = kv.length + tokens.shape[1]
        padded = tokens if tokens.shape[1] == 1 else padded_tokens(tokens)
        kv = kv.grown(kv.length + padded.shape[1])
        step = module.steps.decode_donating if donate else module.steps.decode
        logits, layers = step(module.params, padded, jnp.int32(kv.length), kv.layers)
        real = logits if padded is tokens else logits[:, : tokens.shape[1]]
        return real, DenseKV(layers, length)

    def _module(self, source: str | Path | DecodeModule) -> DecodeModule:
        if isinstance(source, DecodeModule):
            if not same_devices(source.mesh, self.model.mesh):
                raise PshareError("the decode module is not on the devices of this decode mesh; load it on that mesh.")
            return source
        if source == "base":
            return DecodeModule(self.model.architecture, self.model.params, self.model.mesh)
        return load_module(source, self.model, prefill=self._prefill)


class SharedModel:
    """A factorised model: one prefill module and the tasks' decode modules, on one mesh or on two."""

    def __init__(self, prefill: PrefillModule, decode: TaskModules):
        self.prefill_module, self.task_modules = prefill, decode

    @property
    def model(self) -> Model:
        """The base on the prefill mesh."""
        return self.prefill_module.model

    @property
    def config(self) -> ModelConfig:
        """The base's config."""
        return self.model.config

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order of addition."""
        return self.task_modules.tasks

    def add_task(self, name: str, source: str | Path | DecodeModule) -> None:
        """Add a task: "base", a decode module's folder, or a `DecodeModule` on the decode mesh."""
        self.task_modules.add_task(name, source)

    def prefill(self, tokens: Any, kv: DenseKV | None = None) -> DenseKV:
        """The base's KV of int tokens `[B, T]` that follow those in `kv`, if given, on the prefill mesh."""
        return self.prefill_module.prefill(tokens, kv)

    def transfer(self, kv: DenseKV) -> DenseKV:
        """A copy of `kv` on the decode mesh, made by one `jax.device_put`."""
        return self.task_modules.transfer(kv)

    def decode(
        self, task: str, tokens: Any, kv: DenseKV, *, donate: bool = False, active: bool = True
    ) -> tuple[Float[Array, "B T V"], DenseKV]:
        """The task's logits `[B, T, V]` of int tokens `[B, T]` after `kv` on the decode mesh, and the extended KV."""
        return self.task_modules.decode(task, tokens, kv, donate=donate, active=active)

    def split(self, task: str, prompt: Sequence[int], response_start: int | None = None) -> Split:
        """Where the task's module divides a prompt (`Boundary.split`)."""
        return self.task_modules.module(task).boundary.split(prompt, response_start)


def factorize(model: Model, *, prefill_mesh: Mesh | None = None, decode_mesh: Mesh | None = None) -> SharedModel:
    """Split a model by phase: its weights become the frozen prefill module, and `add_task` adds the decode modules.

    Both meshes default to the model's. On another mesh the base is copied once, whatever the number of tasks.
    """
    return SharedModel(PrefillModule(model, prefill_mesh), TaskModules(model, decode_mesh))


def check_fits(tokens: np.ndarray, kv: DenseKV, config: ModelConfig) -> None:
    """Refuse tokens `[B, T]` that exceed the model's context or whose number of rows is not that of `kv`."""
    length = kv.length + tokens.shape[1]
    if length > config.max_len:
        raise PshareError(f"{length} tokens exceed the model's maximum context length of {config.max_len} tokens.")
    # XLA would silently write the first rows only.
    if tokens.shape[0] != kv.batch:
        raise PshareError(f"tokens have {tokens.shape[0]} rows, but the KV has {kv.batch}; both need the same number.")


def padded_tokens(tokens: np.ndarray) -> np.ndarray:
    """Tokens padded with zeros to the next bucket's length; no real token attends to the padding."""
    return np.pad(tokens, ((0, 0), (0, bucket(tokens.shape[1]) - tokens.shape[1])))
