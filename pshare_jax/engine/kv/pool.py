"""One KV pool: its page manager, and the device arrays behind it.

The manager is used under the engine's lock; only the thread that owns the pool touches the arrays, without the lock. When
a step fails, both are replaced by empty ones.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pshare_jax.engine.kv.key_watch import KeyWatch
from pshare_jax.engine.kv.page_manager import CacheStats, PageManager
from pshare_jax.engine.shapes import transfer_ranges


@runtime_checkable
class PageStore(Protocol):
    """A pool's device arrays (device_pages.py): `num_pages` pages of `page_size` tokens, moved in these numbers."""

    num_pages: int
    page_size: int
    move_buckets: Sequence[int]

    def run(self, step: Callable[..., tuple[Any, Any]], params: Any, tokens: Any, rows: Any) -> Any:
        """Calls `step(params, tokens, rows, pages)`, keeps the pages it returns and gives back its other result."""
        ...

    def empty_tables(self, num_slots: int, table_len: int) -> Any:
        """Page tables `[num_slots, table_len]` of padding, on this pool's devices."""
        ...

    def put_table(self, tables: Any, slot: int, pages: Sequence[int]) -> Any:
        """The page tables with a new one in the slot; they are donated."""
        ...

    def gather(self, ids: Sequence[int]) -> Any:
        """The content of pages, on this pool's devices."""
        ...

    def device_put(self, content: Any) -> Any:
        """Content of another pool, or from host memory, on its way to this pool's devices (dispatched)."""
        ...

    def scatter(self, ids: Sequence[int], content: Any) -> None:
        """Writes placed content into pages."""
        ...

    def fill(self, ids: Sequence[int]) -> None:
        """Makes the content of pages unusable (debug mode)."""
        ...

    def reset(self) -> None:
        """New, empty arrays: a failed step has made the old ones useless."""
        ...


class Pool:
    """`num_pages` pages of `page_size` tokens, page 0 included. `generation` counts how often it was rebuilt.

    With `debug`, freed pages are filled with NaN before they are used again. At most `pinned_share` of the pages are
    pinned, for times that `clock` counts in seconds.
    """

    def __init__(
        self,
        name: str,
        store: PageStore,
        debug: bool = False,
        pinned_share: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.store = name, store
        self.num_pages, self.page_size = store.num_pages, store.page_size
        self.generation = 0
        self.num_steps = 0
        """Steps so far: of two that have failed, the earlier is to blame, since its arrays are the later one's."""
        self.cache_stats = CacheStats()
        self.watch = KeyWatch()
        self._debug, self._max_pinned, self._clock = debug, int(pinned_share * self.num_usable), clock
        self.manager = self._new_manager()

    @property
    def num_usable(self) -> int:
        """Pages that can be lent."""
        return self.num_pages - 1

    @property
    def num_in_state(self) -> dict[str, int]:
        """The usable pages: used by live requests, cached for later prompts, or free."""
        manager = self.manager
        return {"used": manager.num_used, "cached": manager.num_cached, "free": manager.num_free}

    @property
    def num_pinned(self) -> int:
        """Pages that are pinned now."""
        self.manager.sessions.expire()
        return self.manager.sessions.num_pinned

    def moves(self, first: int, last: int) -> list[tuple[int, int]]:
        """The pages from `first` to `last` of a table in ranges, each for one transfer."""
        return list(transfer_ranges(first, last, self.store.move_buckets))

    def rebuild(self) -> None:
        """Replaces the manager and the arrays by empty ones. Called by the pool's thread, under the engine's lock."""
        self.generation += 1
        self.manager = self._new_manager()
        self.watch.all_moved()
        self.store.reset()

    def run(self, step: Callable[..., tuple[Any, Any]], params: Any, tokens: Any, rows: Any) -> Any:
        """A prefill, scoring or decode step over the pool (see `PageStore.run`); called by the pool's thread."""
        self._erase_freed()
        self.num_steps += 1
        return self.store.run(step, params, tokens, rows)

    def scatter(self, ids: Sequence[int], content: Any) -> None:
        """Writes placed content into pages; called by the pool's thread."""
        self._erase_freed()
        self.store.scatter(ids, content)

    def _erase_freed(self) -> None:
        """Before each write, since a page may have been lent again: what is written now must not be erased later."""
        freed = set()
        # Not `clear`: other threads may free pages meanwhile.
        while self._freed:
            freed.add(self._freed.pop())
        if freed:
            self.store.fill(sorted(freed))

    def _new_manager(self) -> PageManager:
        # A list of its own: what is released to the manager of a failed pool says nothing about the new pages.
        self._freed: list[int] = []
        on_free = self._freed.extend if self._debug else None
        return PageManager(self.num_pages, on_free, self.cache_stats, self._max_pinned, self._clock, self.watch)


@dataclass(eq=False)
class PageTable:
    """A sequence's pages in one pool, in prompt order. `manager` lent them, even if the pool has a new manager since."""

    pool: Pool
    manager: PageManager
    pages: list[int]
    num_shared: int

    @property
    def stale(self) -> bool:
        """Whether the pool was rebuilt since, so that the pages' content is lost."""
        return self.manager is not self.pool.manager

    def fits(self, num_tokens: int) -> bool:
        """Whether the pages have room for so many tokens."""
        return num_tokens <= len(self.pages) * self.pool.page_size

    def release(self) -> None:
        """Releases all pages."""
        self.manager.release(self.pages)
        self.pages = []
