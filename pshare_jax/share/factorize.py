"""Factorise a model (PrefillShare, arXiv 2602.12029): a frozen prefill module makes the context's KV, from which others decode.

`factorize` gives a `SharedModel` for notebooks, tests and offline use; the server composes the same two halves, one
`PrefillModule` for each prefill worker and one `TaskModules` for each decode worker.
"""

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
from pshare_jax.share.decode_module import DecodeModule, Prefill, load_module
from pshare_jax.share.model import Model, checked_tokens

CHUNK = 512
"""Tokens a prefill step at most: bounds the shapes that are compiled and the memory of attention scores."""


class PrefillModule:
    """The base on one mesh, turning tokens into KV. It has no use for a head and never samples."""

    def __init__(self, model: Model, mesh: Mesh | None = None):
        self.model = model if mesh is None else model.on(mesh)

    def prefill(self, tokens: Any, kv: DenseKV | None = None) -> DenseKV:
        """KV of int tokens `[B, T]` (T may be 0), after those in `kv` if given; `kv` itself stays usable."""
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

        # Every array is one of its own: a decode step may be given them to write in place.
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
    """All tasks of one decode mesh. The base's weights are there once, whatever the number of tasks that use them.

    `prefill` is whose KV the tasks decode from: the base's, or (the isolated baseline) each task's own.
    """

    def __init__(self, model: Model, mesh: Mesh | None = None, prefill: Prefill = "base"):
        self.model = model if mesh is None else model.on(mesh)
        self._prefill: Prefill = prefill
        self._tasks: dict[str, DecodeModule] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order in which they were added."""
        return tuple(self._tasks)

    def add_task(self, name: str, source: str | Path | DecodeModule) -> None:
        """Add a task: "base", a decode module's folder, or a `DecodeModule` on this mesh.

        A folder made for another base, or for a prefill of its own, is refused.
        """
        if not name or name in self._tasks:
            raise PshareError(
                f"a task named '{name}' " + ("exists already." if name else "needs a name of one character.")
            )
        self._tasks[name] = self._module(source)

    def module(self, task: str) -> DecodeModule:
        """The task's decode module; an unknown name is refused with the list of known ones."""
        if task not in self._tasks:
            raise PshareError(f"there is no task '{task}'; known tasks: {', '.join(self._tasks) or 'none'}.")
        return self._tasks[task]

    def place(self, kv: DenseKV) -> DenseKV:
        """KV from the prefill mesh in this mesh's sharding, by one `jax.device_put`; always arrays of its own."""
        sharding = kv_sharding(self.model.config, self.model.mesh)
        # On the same devices an alias would be destroyed with whichever of the two is donated first.
        return replace(kv, layers=jax.device_put(kv.layers, sharding, may_alias=False))

    def decode(
        self, task: str, tokens: Any, kv: DenseKV, *, donate: bool = False
    ) -> tuple[Float[Array, "B T V"], DenseKV]:
        """Feed int tokens `[B, T]`, T >= 1, to the task's module after `kv`; logits of each position and the longer KV.

        With `donate` the old `kv` must not be used again (its memory is written in place); without, it is copied.
        """
        module = self.module(task)
        tokens = checked_tokens(tokens, self.model.config)
        if tokens.shape[1] == 0:
            raise PshareError("decode needs at least one token.")
        check_fits(tokens, kv, self.model.config)
        length = kv.length + tokens.shape[1]
        padded = tokens if tokens.shape[1] == 1 else padded_tokens(tokens)
        kv = kv.grown(kv.length + padded.shape[1])
        step = module.steps.decode_donating if donate else module.steps.decode
        logits, layers = step(module.params, padded, jnp.int32(kv.length), kv.layers)
        wanted = logits if padded is tokens else logits[:, : tokens.shape[1]]
        return wanted, DenseKV(layers, length)

    def _module(self, source: str | Path | DecodeModule) -> DecodeModule:
        if isinstance(source, DecodeModule):
            if not same_devices(source.mesh, self.model.mesh):
                raise PshareError("this decode module lies on other devices than its decode worker.")
            return source
        if source == "base":
            return DecodeModule(self.model.architecture, self.model.params, self.model.mesh)
        return load_module(source, self.model, prefill=self._prefill)


class SharedModel:
    """A factorised model: one prefill module and its tasks' decode modules, on one mesh or on two."""

    def __init__(self, prefill: PrefillModule, decode: TaskModules):
        self.prefill_module, self.task_modules = prefill, decode

    @property
    def model(self) -> Model:
        """The base, as it lies on the prefill mesh."""
        return self.prefill_module.model

    @property
    def config(self) -> ModelConfig:
        """The base's config."""
        return self.model.config

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names in the order in which they were added."""
        return self.task_modules.tasks

    def add_task(self, name: str, source: str | Path | DecodeModule) -> None:
        """Add a task: "base", a decode module's folder, or a `DecodeModule`."""
        self.task_modules.add_task(name, source)

    def prefill(self, tokens: Any, kv: DenseKV | None = None) -> DenseKV:
        """The base's KV of int tokens `[B, T]`, after those in `kv` if given, on the prefill mesh."""
        return self.prefill_module.prefill(tokens, kv)

    def transfer(self, kv: DenseKV) -> DenseKV:
        """KV on the decode mesh, moved by one `jax.device_put`; a copy where both meshes are the same devices."""
        return self.task_modules.place(kv)

    def decode(
        self, task: str, tokens: Any, kv: DenseKV, *, donate: bool = False
    ) -> tuple[Float[Array, "B T V"], DenseKV]:
        """The task's logits `[B, T, V]` for int tokens `[B, T]` after `kv` (on the decode mesh), and the longer KV."""
        return self.task_modules.decode(task, tokens, kv, donate=donate)


def factorize(model: Model, *, prefill_mesh: Mesh | None = None, decode_mesh: Mesh | None = None) -> SharedModel:
    """Split a model by phase: its weights become the frozen prefill module; tasks are added with `add_task`.

    Meshes default to the one that the model lies on; on another mesh it gets one copy, however many tasks there are.
    """
    return SharedModel(PrefillModule(model, prefill_mesh), TaskModules(model, decode_mesh))


def check_fits(tokens: np.ndarray, kv: DenseKV, config: ModelConfig) -> None:
    """Refuse tokens `[B, T]` that a KV cannot take: more than the model's context, or another number of rows."""
    length = kv.length + tokens.shape[1]
    if length > config.max_len:
        raise PshareError(f"{length} tokens are more than the model's maximum context length of {config.max_len}.")
    # XLA would write the first rows of a KV with more of them, and leave the others as they were.
    if tokens.shape[0] != kv.batch:
        raise PshareError(f"tokens have {tokens.shape[0]} rows, but the KV has {kv.batch}.")


def padded_tokens(tokens: np.ndarray) -> np.ndarray:
    """Tokens filled up with zeros to the next bucket's length; what the padding computes is never visible to a token."""
    return np.pad(tokens, ((0, 0), (0, bucket(tokens.shape[1]) - tokens.shape[1])))
