"""What the engine and its workers are built from: weights, samplers, worker specs, model facts and the workers' hooks.

The builder (build.py) and tests create the specs and facts, the engine its hooks.
"""

import threading
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pshare_jax.engine.failures import StepFailed, StepWatch
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.request import Event, TokenLogprobs
from pshare_jax.engine.sequence import Sequence, State
from pshare_jax.share.boundary import Boundary
from pshare_jax.text.grammar import GrammarCompiler
from pshare_jax.text.stop_strings import Pieces


@runtime_checkable
class Weights(Protocol):
    """Weights on a worker's mesh: the base's or a task's decode module's (pshare_jax/share)."""

    @property
    def params(self) -> Any:
        """The parameters."""
        ...

    @property
    def paged(self) -> Any:
        """The paged steps (model/paged_steps.py) of these parameters."""
        ...

    @property
    def slot(self) -> int:
        """The slot of the adapter in the parameters' stack; 0 for none."""
        ...

    @property
    def group(self) -> Any:
        """Rows whose weights have the same object as their group may share a step; each passes its own slot."""
        ...

    @property
    def current(self) -> "Weights":
        """The group's weights as they are now, for one step: with `params` and `paged` that belong together, since an adapter
        that is loaded may change both.
        """
        ...


@runtime_checkable
class Module(Weights, Protocol):
    """A task's decode module on a decode worker's mesh."""

    @property
    def boundary(self) -> Boundary:
        """Where it divides prompts."""
        ...

    @property
    def base(self) -> Weights | None:
        """The base's weights if the module is an activated LoRA, which leaves some tokens to them."""
        ...


def weights_of(modules: Iterable[Module]) -> list[Weights]:
    """The current weights of all groups that the modules' steps compute with."""
    used = [weights for module in modules for weights in (module, module.base) if weights is not None]
    return [weights.current for weights in {id(weights.group): weights for weights in used}.values()]


Choice = Callable[[int, Sequence], tuple[int, TokenLogprobs | None]]
"""The choice for a row of the batch: token id and, where requested, log-probabilities."""


@runtime_checkable
class Pending(Protocol):
    """A dispatched choice."""

    def fetch(self) -> Choice:
        """Waits for the step, and brings its choices to the host. The choice for a row may raise (GrammarFailed: with a
        sentence for the user).
        """
        ...


@runtime_checkable
class SamplerRows(Protocol):
    """What the sampler keeps on the device of the sequences of one group, by slot."""

    tokens: Any
    """The last token of each slot `[slots + 1]`, which the next decode step consumes; the last slot is for padding."""

    def join(self, slot: int, sequence: Sequence) -> None:
        """A sequence takes a slot: writes its next input token, and what its answer so far means for its next tokens.

        Raises:
            RowFailed: its settings or history cannot be used.
        """
        ...

    def prepare(
        self, batch: Items[Sequence], slots: Items[int], positions: Items[int], num_rows: int
    ) -> Callable[[Any], Pending]:
        """Does the host's part for a step of `num_rows` rows that chooses the tokens at these positions. Its result takes the
        logits `[num_rows, vocab_size]`, which may still be computed, and writes the choices into `tokens`; it reads where
        the answers are in their grammars.
        """
        ...


@runtime_checkable
class TokenSampler(Protocol):
    """Chooses next tokens on a decode worker's devices (sampler.py)."""

    def new_rows(self, num_slots: int) -> SamplerRows:
        """The state of a group without sequences."""
        ...

    def lower(self, num_rows: int) -> Any:
        """The call for this many rows, ready to be compiled."""
        ...

    def lower_join(self) -> Any:
        """The call that seats a sequence in a slot, ready to be compiled."""
        ...


@dataclass(frozen=True)
class PrefillSpec:
    """A prefill worker: its weights, pool, device indices, and the tasks that it takes (None: all)."""

    weights: Weights
    pool: Pool
    devices: Collection[int]
    tasks: Collection[str] | None = None


@dataclass(frozen=True)
class DecodeSpec:
    """A decode worker: its tasks' modules, pool, sampler, device indices, and for new tasks the base and the stack of adapters
    (share/adapter_stack.py) on its mesh.
    """

    tasks: dict[str, Module]
    pool: Pool
    sampler: TokenSampler
    devices: Collection[int]
    base: Any = None
    stack: Any = None


@dataclass(frozen=True)
class ModelFacts:
    """What the engine knows of its model. `key_of(task)` identifies the weights that compute the task's prompt KV; without
    `grammars`, requests with a grammar are refused.
    """

    key_of: Callable[[str], str]
    detokenizer: Callable[[], Pieces]
    vocab_size: int
    max_len: int
    page_bytes: int = 0
    stop_ids: frozenset[int] = frozenset()
    grammars: GrammarCompiler | None = None


@dataclass(frozen=True)
class EngineHooks:
    """The workers' calls into the engine. Its state is read and written under the re-entrant `lock`, never during device
    work.

    `admitted(sequence)` reports its first admission, `first_token(sequence)` its first generated token.
    `end(sequence, state, event)` ends a sequence once, from any thread; the worker that has it releases its pages.
    `prefilled(sequence)` reports that `num_prefilled` has changed. `step_failed(pool, watch, failure, works)` is called
    by the pool's thread after a failed step; `works()` runs a step on padding. `wake()` wakes all worker threads.
    """

    lock: threading.RLock
    admitted: Callable[[Sequence], None]
    first_token: Callable[[Sequence], None]
    end: Callable[[Sequence, State, Event], None]
    prefilled: Callable[[Sequence], None]
    step_failed: Callable[[Pool, StepWatch, StepFailed, Callable[[], bool]], None]
    wake: Callable[[], None]
