"""A copy of pages on its way from a prefill pool to a decode pool. Host-side, imports no jax."""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pshare_jax.engine.kv.pool import PageTable

if TYPE_CHECKING:
    from pshare_jax.engine.request import Sequence


@dataclass(eq=False)
class PageTransfer:
    """Entries `first` to `last` of a sequence's page table, from its prefill pages into its decode pages.

    The source is pinned until the copy is done or failed. If its sequence ends while others wait for these pages, the copy
    inherits the table up to them (`inherited`) and goes on; if nobody waits it is `unwanted` and is dropped unwritten, so
    that nothing is ever written into pages that were given back.
    """

    sequence: "Sequence"
    source: PageTable
    target: PageTable
    first: int
    last: int
    source_pages: list[int] = field(init=False)
    inherited: list[int] | None = None
    unwanted: bool = False
    content: Any = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Notes the source's pages, whose ids its holder may change."""
        self.source_pages = self.source.pages[self.first : self.last]

    @property
    def target_pages(self) -> list[int]:
        """Where the content goes."""
        return (self.inherited or self.target.pages)[self.first : self.last]
