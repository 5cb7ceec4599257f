"""A decode step from its dispatch until its tokens are reported."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

from pshare_jax.engine.decode.rows import Row
from pshare_jax.engine.failures import NOT_DISPATCHED, Places, StepFailed
from pshare_jax.engine.shapes import Shape


@dataclass(eq=False)
class StepInFlight:
    """A dispatched step of `rows`; `pending` fetches its tokens, and `order` is its number among the pool's steps."""

    rows: Items[Row]
    shape: Shape | None
    order: int = NOT_DISPATCHED
    pending: Any = None
    places: Places = field(init=False)

    def __post_init__(self) -> None:
        """Keeps where the sequences were when it was dispatched."""
        self.places = [(row.sequence, row.num_tokens) for row in self.rows]

    def failure(self, error: Exception) -> StepFailed:
        """What its failure is."""
        return StepFailed("decode", self.places, error, self.shape, self.order)
