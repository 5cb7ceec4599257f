"""The contract of objectives: a loss from the decode stream's hidden states at the target positions of a batch.

`objective.py` computes the hidden states and calls the loss, `steps.py` differentiates. A loss works on the head's logits in
chunks (`chunks.py`), never on all at once. What is summed is the log-probability that the server gives to the answers.

    cross_entropy.py   sft: the answers' negative log-likelihood
    distillation.py    the divergence from a teacher on its own KV
    dpo.py             a preferred answer against a rejected answer, over one context
"""

from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from pshare_jax.training.data.batches import OneStreamBatch, TwoStreamBatch
from pshare_jax.training.step.chunks import Head

Batch = TwoStreamBatch | OneStreamBatch


class Tallies(NamedTuple):
    """Sums over a batch: target tokens, those that have the largest logit, `terms`, over which the loss is a mean, and
    `metrics`, whose means over `terms` are reported.
    """

    tokens: Float[Array, ""]
    correct: Float[Array, ""]
    terms: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class Guided(NamedTuple):
    """A batch that a second model has read first (`guide.py`): the `signal` of that model's program, arrays `[B, D, ...]`,
    and its head's weight.
    """

    batch: Batch
    signal: Any
    head: Array


@runtime_checkable
class Loss(Protocol):
    """An objective. Hashable, since compiled programs are made for it."""

    metrics: ClassVar[tuple[str, ...]]
    """Names of the tallies' metrics."""
    logits_arrays: ClassVar[int]
    """Arrays of a chunk's logits, or of their size, that exist at once; for the memory plan."""
    guide_kv: ClassVar[Literal["own", "same"] | None]
    """The KV on which a second model reads each batch first: its own, or the same as the module; None: there is no such model."""

    def signal(self, head: Head, hidden: Float[Array, "B D size"], batch: Batch) -> Any:
        """What the second model tells of a batch, from its head and its hidden states at the targets."""
        ...

    def __call__(
        self, head: Head, hidden: Float[Array, "B D size"], batch: Batch, guided: Guided | None
    ) -> tuple[Float[Array, ""], Tallies]:
        """The sum of the batch's losses in float32, and its tallies; `guided` None for an objective without second model."""
        ...
