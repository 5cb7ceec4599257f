"""One KV pool: its books (allocator, prefix cache) and the device arrays behind them. Host-side, imports no jax.

Books are kept under the engine's lock; the device arrays are touched only by the thread that owns the pool. When a step
fails, the arrays and everything known about them are replaced by new, empty ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pshare_jax.engine.kv.allocator import PageAllocator
from pshare_jax.engine.kv.prefix_cache import CacheStats, PrefixCache


@runtime_checkable
class PageStore(Protocol):
    """A pool's device arrays (page_store.py): `num_pages` pages of `page_size` tokens, moved in these numbers."""

    num_pages: int
    page_size: int
    move_buckets: Sequence[int]

    def run(self, step: Callable[..., tuple[Any, Any]], params: Any, tokens: np.ndarray, rows: Any) -> Any:
        """Calls `step(params, tokens, rows, pages)`, keeps the pages it returns and gives back its other result."""
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

    With `debug`, pages whose content has become nobody's are filled with NaN before they are used again.
    """

    def __init__(self, name: str, store: PageStore, debug: bool = False):
        self.name, self.store = name, store
        self.num_pages, self.page_size, self.move_pages = store.num_pages, store.page_size, store.move_buckets[-1]
        self.generation = 0
        self.cache_stats = CacheStats()
        self._debug = debug
        self.cache = self._new_cache()

    @property
    def allocator(self) -> PageAllocator:
        """The books of the pages."""
        return self.cache.allocator

    @property
    def num_usable(self) -> int:
        """Pages that can be lent."""
        return self.num_pages - 1

    @property
    def num_in_state(self) -> dict[str, int]:
        """The usable pages: used by live requests, cached for prompts to come, or free."""
        books = self.allocator
        return {"used": books.num_used, "cached": books.num_cached, "free": books.num_free}

    def rebuild(self) -> None:
        """Forgets everything: the old pages are lost. Called by the owner, under the engine's lock."""
        self.generation += 1
        self.cache = self._new_cache()
        self.store.reset()

    def run(self, step: Callable[..., tuple[Any, Any]], params: Any, tokens: np.ndarray, rows: Any) -> Any:
        """A prefill or decode step over the pool; called by the owner."""
        self._erase_freed()
        return self.store.run(step, params, tokens, rows)

    def scatter(self, ids: Sequence[int], content: Any) -> None:
        """Placed content into pages; called by the owner."""
        self._erase_freed()
        self.store.scatter(ids, content)

    def _erase_freed(self) -> None:
        """Before each write, since a page may have been lent again: what is written now must not be erased later."""
        freed = set()
        # One by one: others may give pages back meanwhile.
        while self._freed:
            freed.add(self._freed.pop())
        if freed:
            self.store.fill(sorted(freed))

    def _new_cache(self) -> PrefixCache:
        # A list of its own: what is given back to the books of a failed pool says nothing about the new pages.
        self._freed: list[int] = []
        on_free = self._freed.extend if self._debug else None
        return PrefixCache(PageAllocator(self.num_pages, on_free), self.cache_stats)


@dataclass(eq=False)
class PageTable:
    """A sequence's pages in one pool, in prompt order. `cache` is the pool's at the time, whatever becomes of the pool."""

    pool: Pool
    cache: PrefixCache
    pages: list[int]
    num_shared: int

    @property
    def lost(self) -> bool:
        """Whether the pool was rebuilt since."""
        return self.cache is not self.pool.cache

    def fits(self, num_tokens: int) -> bool:
        """Whether the pages have room for so many tokens."""
        return num_tokens <= len(self.pages) * self.pool.page_size

    def release(self) -> None:
        """Gives all pages back."""
        self.cache.allocator.release(self.pages)
        self.pages = []
