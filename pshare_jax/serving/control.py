"""What workers share with the engine: its lock, and what they tell it. Host-side, imports no jax."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pshare_jax.serving.pool import Pool
from pshare_jax.serving.request import Event, Sequence, State


@dataclass(frozen=True)
class Control:
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
