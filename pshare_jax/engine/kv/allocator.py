"""Which pages of one KV pool are free, used or cached: free list, reference counts and eviction order.

A page is *used* while somebody holds a reference, *cached* when nobody does but the prefix cache still knows it, else
*free*. Page 0 is for padding and never handed out. Host code; called only by the thread that owns the pool: no locks.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

SEQUENCE = "sequence"


class PageAllocator:
    """The books of one pool of `num_pages` pages, of which ids 1 to `num_pages - 1` are lent.

    `on_free` is called with the pages whose content has just become nobody's (released or evicted), before any of them
    is lent again: the engine's debug mode fills them with NaN. `holders` counts references by the reason given for them
    ("sequence", "transfer", ...), so that a leak has a name. Wrong use raises AssertionError: the books are broken.
    """

    def __init__(self, num_pages: int, on_free: Callable[[list[int]], None] | None = None):
        if num_pages < 2:
            raise ValueError(f"A pool of {num_pages} pages has none to lend, since page 0 is for padding.")
        self.num_pages = num_pages
        self.num_evicted = 0
        self.holders: Counter[str] = Counter()
        self._on_free = on_free
        self._on_evict: Callable[[int], None] = _no_cache
        self._free = list(range(num_pages - 1, 0, -1))
        self._counts = [0] * num_pages
        self._kept = bytearray(num_pages)
        self._cached: OrderedDict[int, None] = OrderedDict()  # the kept pages that nobody holds, oldest first

    @property
    def num_free(self) -> int:
        """Pages with no content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and the prefix cache knows; each can be evicted."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - 1 - len(self._free) - len(self._cached)

    def references(self, page: int) -> int:
        """How many hold this page."""
        return self._counts[page]

    def allocate(self, num: int, holder: str = SEQUENCE) -> list[int] | None:
        """`num` pages with one reference each, or None (and nothing changed) if free and cached are fewer.

        Cached pages are evicted, longest unused first, only when the free ones are too few.
        """
        if num < 0:
            raise AssertionError(f"{num} pages were asked for")
        if num > len(self._free) + len(self._cached):
            return None
        if num > len(self._free):
            self.num_evicted += self.evict(num - len(self._free))
        pages = [self._free.pop() for _ in range(num)]
        for page in pages:
            self._counts[page] = 1
        self._count_holder(holder, num)
        return pages

    def retain(self, pages: Sequence[int], holder: str = SEQUENCE) -> None:
        """One more reference to each of these used or cached pages."""
        for page in pages:
            if self._counts[page] == 0 or page < 1:
                self._leave_cached(page)
            self._counts[page] += 1
        self._count_holder(holder, len(pages))

    def release(self, pages: Sequence[int], holder: str = SEQUENCE) -> None:
        """One reference less to each; `pages` are in prompt order.

        They are given back from the last to the first, so that of pages last used together the end of a prompt is
        evicted before its beginning, without which no hit reaches it.
        """
        self._count_holder(holder, -len(pages))
        freed = []
        for page in reversed(pages):
            left = self._counts[page] - 1
            if left < 0 or page < 1:
                raise AssertionError(f"page {page} was released by {holder} and nobody held it")
            self._counts[page] = left
            if left == 0 and self._kept[page]:
                self._cached[page] = None
            elif left == 0:
                freed.append(page)
        self._give_back(freed)

    def check(self) -> None:
        """Proves the books: raises AssertionError that says what is wrong. Looks at every page once."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page, count in enumerate(self._counts) if count > 0}
        expect(len(free) == len(self._free), "a page is in the free list twice")
        expect(all(count >= 0 for count in self._counts), "a reference count is negative")
        expect(not (free & cached or free & used or cached & used), "a page is in two states at once")
        expect(free | cached | used == set(range(1, self.num_pages)), "a page is lost, or page 0 was lent")
        expect(not any(self._kept[page] for page in free), "a free page is still known to the prefix cache")
        expect(all(self._kept[page] for page in cached), "a cached page is unknown to the prefix cache")
        held, reasons = sum(self._counts), dict(self.holders)
        expect(sum(reasons.values()) == held, f"{held} references are held, but the holders are {reasons}")

    # What follows is for the prefix cache.

    def attach(self, on_evict: Callable[[int], None]) -> None:
        """Makes a prefix cache this pool's: `on_evict(page)` must `forget` that cached page (and may forget more)."""
        if self._on_evict is not _no_cache:
            raise AssertionError("the pool already has a prefix cache")
        self._on_evict = on_evict

    def is_kept(self, page: int) -> bool:
        """Whether the prefix cache knows the page."""
        return bool(self._kept[page])

    def kept_pages(self) -> set[int]:
        """The pages that the prefix cache knows, used or cached (looks at every page)."""
        return {page for page, kept in enumerate(self._kept) if kept}

    def keep(self, page: int) -> None:
        """The prefix cache knows this used page from now on: without holders it becomes cached, not free."""
        if self._counts[page] < 1 or self._kept[page]:
            raise AssertionError(f"page {page} cannot be published: nobody holds it, or it is published already")
        self._kept[page] = 1

    def forget(self, pages: Sequence[int]) -> None:
        """The prefix cache knows these pages no more: the cached ones are free, the used ones when released."""
        freed = []
        for page in pages:
            if not self._kept[page]:
                raise AssertionError(f"page {page} was forgotten by the prefix cache, which did not know it")
            self._kept[page] = 0
            if self._counts[page] == 0:
                del self._cached[page]
                freed.append(page)
        self._give_back(freed)

    def evict(self, num: int) -> int:
        """Frees cached pages, longest unused first, until `num` or more have gone or none is left; says how many."""
        before = len(self._free)
        while self._cached and len(self._free) < before + num:
            oldest = next(iter(self._cached))
            self._on_evict(oldest)
            expect(oldest not in self._cached, f"the prefix cache did not forget the evicted page {oldest}")
        return len(self._free) - before

    def _leave_cached(self, page: int) -> None:
        if page not in self._cached:
            raise AssertionError(f"page {page} was retained, and it is neither used nor cached")
        del self._cached[page]

    def _give_back(self, freed: list[int]) -> None:
        self._free.extend(freed)
        if freed and self._on_free is not None:
            self._on_free(freed)

    def _count_holder(self, holder: str, change: int) -> None:
        if change == 0:
            return
        left = self.holders[holder] + change
        if left < 0:
            raise AssertionError(f"{holder} released {-change} references and held {left - change}")
        if left:
            self.holders[holder] = left
        else:
            del self.holders[holder]


def _no_cache(page: int) -> None:
    raise AssertionError(f"page {page} is cached, and the pool has no prefix cache")


def expect(right: bool, otherwise: str) -> None:
    """Raises AssertionError with this sentence unless it is right (also under `python -O`)."""
    if not right:
        raise AssertionError(otherwise)
