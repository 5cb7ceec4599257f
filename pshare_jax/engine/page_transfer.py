"""KV of some pages in flight from a prefill pool to a decode pool."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pshare_jax.engine.kv.pool import PageTable

if TYPE_CHECKING:
    from pshare_jax.engine.sequence import Sequence


@dataclass(eq=False)
class PageTransfer:
    """Entries `first` to `last` of a sequence's page table, from its prefill pages into its decode pages.

    The source pages are held until the transfer is written or has failed. When its sequence ends while other
    sequences wait for these pages, the transfer adopts the table up to them (`adopted`) and continues; without waiters it
    is `cancelled` and dropped unwritten, so that nothing is ever written into released pages.
    """

    sequence: "Sequence"
    source: PageTable
    target: PageTable
    first: int
    last: int
    source_pages: list[int] = field(init=False)
    adopted: list[int] | None = None
    cancelled: bool = False
    content: Any = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Keeps the source's page ids, since its table may change."""
        self.source_pages = self.source.pages[self.first : self.last]

    @property
    def target_pages(self) -> list[int]:
        """The pages that the content is written into."""
        return (self.adopted or self.target.pages)[self.first : self.last]

    @property
    def needed_by_sequence(self) -> bool:
        """Whether its own sequence still needs it."""
        return self.adopted is None and not self.cancelled

    @property
    def orphaned(self) -> bool:
        """Whether the sequences for which it was kept have ended too."""
        return self.adopted is not None and not self.target.manager.has_waiters(self.target_pages)
