"""What workers are given: weights to compute with, the engine's lock, and ways to tell the engine. Host-side, imports no jax."""

import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.request import Event, Sequence, State, TokenLogprobs


@runtime_checkable
class Weights(Protocol):
    """What a worker computes with on its mesh: the base (pshare_jax.share.model.Model) or a task's module (DecodeModule)."""

    @property
    def params(self) -> Any:
        """The parameters; tasks with the very same object are decoded in one batch."""
        ...

    @property
    def paged(self) -> Any:
        """The paged steps (model/paged_steps.py) of these parameters."""
        ...


@runtime_checkable
class TokenSampler(Protocol):
    """Chooses next tokens on a decode worker's devices (sampler.py)."""

    def sample(
        self, logits: Any, batch: Items[Sequence]
    ) -> Callable[[int, Sequence], tuple[int, TokenLogprobs | None]]:
        """The choice for each row of the batch: token id and, where requested, log-probabilities."""
        ...

    def lower(self, num_rows: int) -> Any:
        """The call for this many rows, ready to be compiled."""
        ...


@dataclass(frozen=True)
class EngineHooks:
    """All books are read and written under `lock` (re-entrant); device work is dispatched outside it.

    `end(sequence, state, event)` ends a sequence once, from any thread; the worker that has it gives its pages back.
    `prefilled(sequence)` tells that its `num_prefilled` has changed. `pool_failed(pool)` is called by the pool's owner
    after a failed step. `wake()` makes every worker look again.
    """

    lock: threading.RLock
    end: Callable[[Sequence, State, Event], None]
    prefilled: Callable[[Sequence], None]
    pool_failed: Callable[[Pool], None]
    wake: Callable[[], None]
