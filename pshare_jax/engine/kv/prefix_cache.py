"""Finds the pages of a prompt that the base has already written, or is writing now, in one KV pool.

A tree of pages by chained key (page_keys.py), kept beside the pool's PageAllocator. The engine reserves a request's
pages here, says which it is about to make (`pend`), publishes them once they are written, and drops whoever has gone.
Host code; called only by the thread that owns the pool: no locks.
"""

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from pshare_jax.engine.kv.allocator import PageAllocator, expect
from pshare_jax.engine.kv.keys import PageKey
from pshare_jax.engine.kv.pending import PendingPages


@dataclass(frozen=True)
class Reservation:
    """A page table: first the pages found in the cache, then those awaited from others, then the sequence's own."""

    pages: list[int]
    num_hits: int
    num_awaited: int

    @property
    def num_shared(self) -> int:
        """How many leading pages the sequence need not make itself."""
        return self.num_hits + self.num_awaited


@dataclass
class CacheStats:
    """Counts since the start; tokens as the engine counted them, once per request."""

    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_published: int = 0
    num_duplicates: int = 0
    num_waits: int = 0

    def count(self, prompt_tokens: int, cached_tokens: int) -> None:
        """One request was admitted. Not called again when it is resumed after a preemption."""
        self.num_requests += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens


@dataclass(eq=False, slots=True)
class _Entry:
    key: PageKey
    page: int
    parent: "_Entry | None"
    children: set["_Entry"] = field(default_factory=set)


class PrefixCache:
    """The cache of one pool. Pages are lists of ids in prompt order, `keys` those of the same prompt's full pages.

    An entry is believed only if its digest, its content and the very entry before it are those asked for, so a hash
    collision is a miss. Every entry's chain is in the tree: an entry that leaves takes those behind it along, since no
    hit can reach them (a page in use stays its holders' then, and is free after them). Whoever holds a page should hold
    all pages before it; then the order of last use evicts ends before beginnings, and nothing is cut off.

    A failed pool gets a new allocator and a new cache: what still holds pages of the old ones gives them back to those.
    """

    def __init__(self, allocator: PageAllocator, stats: CacheStats | None = None):
        self.allocator = allocator
        self.stats = stats or CacheStats()
        self._pending = PendingPages()
        self._entries: dict[bytes, _Entry] = {}
        self._by_page: dict[int, _Entry] = {}
        allocator.attach(self._evict)

    def num_cached(self, keys: Sequence[PageKey]) -> int:
        """How many leading pages of a prompt are published (for the router: holds nothing, changes nothing)."""
        return sum(entry.page not in self._pending for entry in self._chain(keys))

    def reserve(self, owner: Hashable, keys: Sequence[PageKey], num_pages: int) -> Reservation | None:
        """All pages of a sequence, each with one reference, or None (and nothing held) if the pool has too few.

        The owner becomes a waiter for the pages that others have under way; `waiting` says for how long. To undo it
        (another pool had no room): `drop(owner)` and release the pages. No keys: nothing is looked up.
        """
        chain = self._chain(keys)
        shared = [entry.page for entry in chain]
        self.allocator.retain(shared)
        own = self.allocator.allocate(num_pages - len(shared))
        if own is None:
            self.allocator.release(shared)
            return None
        awaited = [page for page in shared if page in self._pending]
        for page in awaited:
            self._pending.wait(owner, page)
        self.stats.num_waits += bool(awaited)
        return Reservation(shared + own, len(shared) - len(awaited), len(awaited))

    def pend(self, owner: Hashable, keys: Sequence[PageKey], pages: Sequence[int], first: int) -> int:
        """The owner, which holds its whole reservation, is about to make the pages from `first` on. Says how many.

        `first` is the reservation's `num_shared`. Registration stops early where a key is taken (by another owner that
        came in between, or a colliding digest) or the page before is not in the tree: from there the pages are private.
        """
        for index in range(first, len(keys)):
            parent = self._before(keys, pages, index)
            if (index and parent is None) or keys[index].digest in self._entries:
                return index - first
            self._pending.add(owner, pages[index])
            self._link(keys[index], pages[index], parent)
        return max(len(keys) - first, 0)

    def waiting(self, waiter: Hashable) -> bool:
        """Whether a page that the waiter awaits is still under way."""
        return self._pending.waits(waiter)

    def has_waiters(self, pages: Sequence[int]) -> bool:
        """Whether anybody awaits one of these pages (an abort must not cancel a copy then, see `hand_over`)."""
        return any(self._pending.awaited(page) for page in pages)

    def publish(
        self, owner: Hashable, keys: Sequence[PageKey], pages: Sequence[int], first: int, last: int
    ) -> list[int]:
        """The base's KV is in `pages[first:last]`: hits may use them. Returns the ids the owner must use from now on.

        They differ where the same page was published meanwhile: the owner's is released for that one, which it then
        holds. Where a page cannot be published (its key is pending elsewhere or collides, the page before is not in
        the tree) it stays the owner's. Only pages with a key can be published: tail and generated pages have none.
        """
        table = list(pages[:last])
        for index in range(first, last):
            parent = self._before(keys, table, index)
            if parent is not None and parent.page in self._pending:
                raise AssertionError(f"page {table[index]} was published before the page before it")
            self._pending.done(owner, table[index])
            if index == 0 or parent is not None:
                table[index] = self._publish_one(keys[index], table[index], parent)
        return table[first:]

    def drop(self, gone: Hashable) -> list[Hashable]:
        """An owner or waiter failed, was aborted or starts anew: nothing is pending for it any more.

        Returns those that waited for its pages (or for theirs), in the order of their coming, also dropped now: each
        must give back all its pages and re-enter admission. `gone` itself releases its pages when nothing uses them.
        """
        pages, waiters = self._pending.drop(gone)
        for page in pages:
            if page in self._by_page:
                self._unlink(self._by_page[page])
        return waiters

    def hand_over(self, owner: Hashable, heir: Hashable, pages: Sequence[int]) -> None:
        """`heir` (a copy in flight) will publish those of the pages that are pending for the owner, or be dropped.

        For an owner that is aborted while others wait for its copy. The heir should hold the owner's whole table.
        """
        self._pending.hand_over(owner, heir, pages)

    def flush(self) -> int:
        """Frees every cached page that nobody holds; says how many."""
        return self.allocator.evict(self.allocator.num_cached)

    def check(self, live: Collection[Hashable] | None = None) -> None:
        """Proves allocator and cache (AssertionError); with `live`, that nothing is pending for anybody else."""
        self.allocator.check()
        self._pending.check(live)
        published = {page for page in self._by_page if page not in self._pending}
        expect(published == self.allocator.kept_pages(), "the allocator keeps other pages than are published")
        expect(all(self.allocator.references(page) for page in self._pending.pages()), "nobody holds a pending page")
        entries = set(self._entries.values())
        expect(entries == set(self._by_page.values()), "the entries by key and by page differ")
        for digest, entry in self._entries.items():
            fault = None
            if entry.key.digest != digest or self._by_page.get(entry.page) is not entry:
                fault = "is under another key or page"
            elif not entry.children <= entries:
                fault = "has a child that has gone"
            elif entry.parent is not None and entry.parent not in entries:
                fault = "is out of reach"
            elif entry.parent is not None and entry not in entry.parent.children:
                fault = "is no child of the page before it"
            elif entry.page in published and entry.parent is not None and entry.parent.page not in published:
                fault = "is published and the page before it is not"
            if fault is not None:
                raise AssertionError(f"page {entry.page} {fault}")

    def _chain(self, keys: Sequence[PageKey]) -> list[_Entry]:
        """The entries of the longest prefix that is in the tree: published ones, then pending ones."""
        chain: list[_Entry] = []
        parent = None
        for key in keys:
            entry = self._entries.get(key.digest)
            if entry is None or not _is(entry, key, parent):
                break
            chain.append(entry)
            parent = entry
        return chain

    def _before(self, keys: Sequence[PageKey], pages: Sequence[int], index: int) -> _Entry | None:
        """The entry of the page before `index`; None for the first page, and where that page is private."""
        parent = self._by_page.get(pages[index - 1]) if index else None
        if parent is not None and parent.key != keys[index - 1]:
            raise AssertionError(f"page {parent.page} is not the page of this prompt before page {pages[index]}")
        return parent

    def _publish_one(self, key: PageKey, page: int, parent: _Entry | None) -> int:
        entry = self._entries.get(key.digest)
        if entry is None:
            expect(page not in self._by_page, f"page {page} is in the tree under another key")
            entry = self._link(key, page, parent)
        if not _is(entry, key, parent) or entry.page in self._pending:
            return page
        if entry.page != page:
            self.stats.num_duplicates += 1
            self.allocator.retain([entry.page])
            self.allocator.release([page])
        elif not self.allocator.is_kept(page):
            self.stats.num_published += 1
            self.allocator.keep(page)
        return entry.page

    def _link(self, key: PageKey, page: int, parent: _Entry | None) -> _Entry:
        entry = self._entries[key.digest] = self._by_page[page] = _Entry(key, page, parent)
        if parent is not None:
            parent.children.add(entry)
        return entry

    def _evict(self, page: int) -> None:
        self._unlink(self._by_page[page])

    def _unlink(self, top: _Entry) -> None:
        """Takes an entry and all behind it out of the tree. Pending pages among them go on, privately."""
        if top.parent is not None:
            top.parent.children.discard(top)
        todo, published = [top], []
        while todo:
            entry = todo.pop()
            todo.extend(entry.children)
            del self._entries[entry.key.digest], self._by_page[entry.page]
            if self.allocator.is_kept(entry.page):
                published.append(entry.page)
        self.allocator.forget(published)


def _is(entry: _Entry, key: PageKey, parent: _Entry | None) -> bool:
    return entry.key.content == key.content and entry.parent is parent
