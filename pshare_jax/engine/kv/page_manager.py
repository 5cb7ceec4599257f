"""The pages of one KV pool: reference counts, the prefix cache with its eviction order, and pages being produced.

There is one record per page (page.py). Prefill, decode and API threads all call the manager, always under the engine's lock.
"""

import itertools
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pshare_jax.engine.kv.eviction import EvictionOrder
from pshare_jax.engine.kv.key_watch import KeyWatch
from pshare_jax.engine.kv.keys import PageKey
from pshare_jax.engine.kv.page import Page
from pshare_jax.engine.kv.sessions import NOBODY, Caller, Session, Sessions, disown

SEQUENCE = "sequence"


class Reservation(NamedTuple):
    """A page table: `num_shared` pages that are published, then that others are producing; then the sequence's own."""

    pages: list[int]
    num_shared: int


@dataclass
class CacheStats:
    """Counts since the start; tokens as the engine counted them, once per request.

    Hits are pages that a request shared: of pinned pages every hit, of prefetched pages the first. `num_put_first` counts
    the pages that ended sessions put first, and `num_lapsed` the pages that are no longer pinned, by reason.
    """

    num_requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    num_published: int = 0
    num_duplicates: int = 0
    num_waits: int = 0
    num_pinned_hits: int = 0
    num_prefetched_hits: int = 0
    num_put_first: int = 0
    num_lapsed: Counter[str] = field(default_factory=Counter)


class PageManager:
    """A pool of `num_pages` pages, of which ids 1 to `num_pages - 1` are lent; page 0 is for padding.

    Lists of pages are ids in prompt order, `keys` those of the same prompt's full pages. Producers and waiters are any
    hashable objects: sequences, and transfers that adopted a sequence's pages. `holders` counts references by the name
    given for them ("sequence", "transfer", ...), so that a leak has a name.

    A page is a hit only if its digest, its content and the very page before it are those asked for. A page that leaves
    the tree takes all pages behind it along, since no hit can reach them; if referenced they become private. A holder of
    a page should hold all pages before it: then eviction (eviction.py) takes ends before beginnings and cuts nothing off,
    since a beginning is used as often as its ends or more, and released after them.

    At most `max_pinned` pages are pinned (`sessions`), by `clock`, which counts seconds. Pins forbid nothing: pinned
    pages are evicted where a reservation needs them and no others are left.

    `on_free` gets the pages that were just freed, before any of them is lent again, and `watch` the keys that enter or leave
    the tree. Wrong use raises AssertionError.
    A failed pool gets a new manager; pages of the old manager are released there.
    """

    def __init__(
        self,
        num_pages: int,
        on_free: Callable[[list[int]], None] | None = None,
        stats: CacheStats | None = None,
        max_pinned: int = 0,
        clock: Callable[[], float] = time.monotonic,
        watch: KeyWatch | None = None,
    ):
        if num_pages < 2:
            raise ValueError(f"A pool of {num_pages} pages has none to lend, since page 0 is for padding.")
        self.num_pages = num_pages
        self.num_evicted = 0
        self.holders: Counter[str] = Counter()
        self.stats = stats or CacheStats()
        self._on_free = on_free
        self._watch = watch or KeyWatch()
        self._pages = [Page(number) for number in range(num_pages)]
        self._free = list(range(num_pages - 1, 0, -1))
        self._evictable = EvictionOrder()
        self.sessions = Sessions(self._evictable, self.stats.num_lapsed, max_pinned, clock)
        self._tree: dict[bytes, Page] = {}  # by the key's digest
        self._produced: dict[Hashable, dict[Page, None]] = {}  # by producer
        self._awaited: dict[Hashable, dict[Page, None]] = {}  # by waiter
        self._version = 0  # counts changes of what `_chain` depends on
        self._last_chains: list[tuple[Sequence[PageKey], int, list[Page]]] = [((), -1, [])] * 2

    @property
    def num_free(self) -> int:
        """Pages without content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Published pages without a reference; each can be evicted."""
        return len(self._evictable)

    @property
    def num_available(self) -> int:
        """Pages that can be lent: free pages and those that can be evicted."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Pages with a reference."""
        return self.num_pages - 1 - self.num_available

    def references(self, page: int) -> int:
        """The page's reference count."""
        return self._pages[page].refs

    def num_hits(self, keys: Sequence[PageKey]) -> int:
        """How many leading pages of a prompt are published (for the router: holds nothing, changes nothing)."""
        return len(self._chain(keys, wait=False))

    def num_shareable(self, keys: Sequence[PageKey]) -> int:
        """How many leading pages of a prompt are published or pending: what `reserve` would share."""
        return len(self._chain(keys))

    def has_digest(self, digest: bytes) -> bool:
        """Whether a page with this key's digest is published or pending, and so, unless digests collide, are all before it."""
        return digest in self._tree

    def waiting(self, waiter: Hashable) -> bool:
        """Whether a page that the waiter needs is still pending."""
        return waiter in self._awaited

    def has_waiters(self, pages: Iterable[int]) -> bool:
        """Whether one of these pages is awaited."""
        return any(self._pages[page].waiters for page in pages)

    def waiters_of(self, producer: Hashable) -> list[Hashable]:
        """All that wait for pages that the producer has pending, without those that wait for them in turn."""
        # They share prefixes, and pages are published in their order: all of them wait for the first of its pages.
        return list(next(iter(self._produced.get(producer, ())), self._pages[0]).waiters)

    def producers_for(self, waiter: Hashable) -> list[Hashable]:
        """The producers of the pending pages that the waiter needs."""
        return list(dict.fromkeys(page.producer for page in self._awaited.get(waiter, ()) if page.producer is not None))

    def producers_of(self, keys: Sequence[PageKey]) -> set[Hashable]:
        """The producers of the pending pages that `reserve` would share."""
        pending = itertools.takewhile(lambda page: page.producer is not None, reversed(self._chain(keys)))
        return {page.producer for page in pending}

    def could_reserve(self, keys: Sequence[PageKey], num_pages: int, spare: int = 0, wait: bool = True) -> bool:
        """Whether `reserve` would succeed and leave `spare` pages or more that can be lent. Changes nothing."""
        if num_pages + spare <= self.num_available:
            return True  # a shared page takes at most one that can be lent, as an own page does
        chain = self._chain(keys, wait)
        num_idle = sum(page.refs == 0 for page in chain)
        return num_pages - len(chain) + spare <= self.num_available - num_idle

    def reserve(
        self,
        sequence: Hashable,
        keys: Sequence[PageKey],
        num_pages: int,
        wait: bool = True,
        caller: Caller = NOBODY,
    ) -> Reservation | None:
        """All pages of a sequence, each with one reference, or None (and nothing changed) if the pool has too few.

        The sequence becomes a waiter for the shared pages that are pending, and the producer of its own pages with a key;
        these stay private from the first key whose digest collides. Without `wait` only published pages are shared: a
        page that is pending elsewhere counts as a collision. Without keys nothing is looked up or registered. To undo a
        reservation: `drop(sequence)` and release the pages. `caller` says whose pages they are.
        """
        if not self.could_reserve(keys, num_pages, wait=wait):
            return None
        chain = self._chain(keys, wait)
        shared = [page.id for page in chain]
        self.retain(shared)
        own = self._lend(num_pages - len(shared), SEQUENCE)
        session, prefetch = self.sessions.of(caller), caller.prefetch
        self._share(sequence, chain, session, prefetch)
        parent = chain[-1] if chain else None
        for key, number in zip(keys[len(chain) :], own, strict=False):
            if key.digest in self._tree:
                break
            page = self._pages[number]
            self._produce(sequence, page)
            self._link(page, key, parent)
            if prefetch:
                page.prefetched = True
            if session is not None:
                page.owner = session
                session.owned[page] = None
            parent = page
        if session is not None:
            session.tip.move(parent)
        return Reservation(shared + own, len(shared))

    def allocate(self, num: int, holder: str = SEQUENCE) -> list[int] | None:
        """`num` private pages with one reference each, or None (and nothing changed) if too few are free or evictable."""
        return self._lend(num, holder) if num <= self.num_available else None

    def retain(self, pages: Sequence[int], holder: str = SEQUENCE) -> None:
        """Adds a reference to each of these pages, none of which may be free."""
        for page in pages:
            record = self._pages[page]
            if page < 1 or (record.refs == 0 and record.key is None):
                raise AssertionError(f"page {page} was retained by {holder}, but it is free")
            if record.refs == 0:
                self._evictable.remove(page)
            record.refs += 1
        self._count(holder, len(pages))

    def release(self, pages: Sequence[int], holder: str = SEQUENCE) -> None:
        """Removes a reference from each, the last page first: so an end of a prompt is evicted before its beginning."""
        self._count(holder, -len(pages))
        freed = []
        for page in reversed(pages):
            record = self._pages[page]
            if page < 1 or record.refs < 1:
                raise AssertionError(f"page {page} was released by {holder}, but it has no reference")
            record.refs -= 1
            if record.refs:
                continue
            if record.producer is not None:
                raise AssertionError(f"page {page} was released by {holder}, but it is pending")
            if record.key is None:
                freed.append(page)
            elif record.pins:
                self._evictable.add_last(page)
            else:
                self._evictable.add(page, record.uses)
        self._give_back(freed)

    def publish(
        self, producer: Hashable, keys: Sequence[PageKey], pages: Sequence[int], first: int, last: int
    ) -> list[int]:
        """The base's KV is written into `pages[first:last]`: hits may use it. Returns the ids to use from now on.

        They differ where the same page was published before: the producer's is released for that page, which it then
        holds. A page whose key is pending elsewhere or collides, or whose page before is not in the tree, stays private.
        Tail and generated pages have no key and cannot be published.
        """
        table = list(pages[:last])
        for index in range(first, last):
            page, key = self._pages[table[index]], keys[index]
            before = self._pages[table[index - 1]] if index else None
            if before is not None and before.key not in (None, keys[index - 1]):
                raise AssertionError(f"page {before.id} is not the page of this prompt before page {page.id}")
            if page.key is not None and (page.key != key or page.parent is not before):
                raise AssertionError(f"page {page.id} is in the tree under another key")
            if before is not None and before.key is not None and before.producer is not None:
                raise AssertionError(f"page {page.id} was published before the page before it")
            if page.producer not in (None, producer):
                raise AssertionError(f"page {page.id} was published by another than its producer")
            if page.key is None or page.producer is not None:
                for waiter in self._stop_producing(page):
                    _remove(self._awaited, waiter, page)
                if before is None or before.key is not None:
                    table[index] = self._publish_one(page, key, before)
        return table[first:]

    def adopt(self, adopter: Hashable, producer: Hashable, pages: Iterable[int]) -> None:
        """Makes the adopter the producer of those of the pages that `producer` has pending; their waiters stay.

        For a transfer in flight whose sequence ends while others wait for its pages. The adopter must hold the pages.
        """
        for page in (self._pages[number] for number in pages):
            if page.producer == producer:
                if adopter in page.waiters:
                    raise AssertionError(f"page {page.id} would be adopted by a waiter for it")
                waiters = self._stop_producing(page)
                self._produce(adopter, page)
                page.waiters = waiters

    def drop(self, gone: Hashable) -> list[Hashable]:
        """A producer or waiter failed, was aborted or starts anew: nothing is pending for it any more.

        Returns all that waited for its pages, directly or not, in the order of their arrival. They are dropped too: each
        must release all its pages and be admitted anew. The pages of `gone` stay held until it releases them.
        """
        leaving = [gone]
        for name in leaving:
            for page in self._awaited.pop(name, ()):
                page.waiters.pop(name, None)
            for page in list(self._produced.get(name, ())):
                self._unlink(page, "unwritten")
                leaving += [waiter for waiter in self._stop_producing(page) if waiter not in leaving]
        return leaving[1:]

    def flush(self) -> int:
        """Frees every published page without a reference; returns their number."""
        return self._evict(len(self._evictable), "flushed")

    def evict_session(self, name: Hashable) -> None:
        """The session has ended: its pages are evicted first (sessions.py)."""
        self.stats.num_put_first += self.sessions.evict(name)

    def check(self, live: Collection[Hashable] | None = None) -> None:
        """Raises AssertionError unless all invariants hold; with `live`, only those may be producers and waiters."""
        for page in self._pages:
            page.check()
        faults = self.sessions.check(self._pages)
        expect(not faults, "; ".join(faults))
        free = [page.id for page in self._pages[1:] if page.refs == 0 and page.key is None]
        expect(sorted(self._free) == free, "the free list is not exactly the free pages")
        idle = [page.id for page in self._pages if page.refs == 0 and page.key is not None]
        right = sorted(self._evictable) == idle
        expect(right, "the evictable pages are not exactly the unreferenced pages with a key")
        pinned = [self._pages[page].pins > 0 for page in self._evictable]
        expect(pinned == sorted(pinned), "a pinned page would be evicted before one that is not pinned")
        tree = {page.key.digest: page for page in self._pages if page.key is not None}
        expect(self._tree == tree, "the tree is not exactly the pages with a key")
        held, holders = sum(page.refs for page in self._pages), dict(self.holders)
        expect(sum(holders.values()) == held, f"{held} references are held, but the holders are {holders}")
        produced = {(page.producer, page) for page in self._pages if page.producer is not None}
        awaited = {(waiter, page) for page in self._pages for waiter in page.waiters}
        for role, index, pairs in (("producers", self._produced, produced), ("waiters", self._awaited, awaited)):
            same = {(name, page) for name, pages in index.items() for page in pages} == pairs
            expect(same and all(index.values()), f"the pages and the index of their {role} disagree")
            gone = [name for name in index if live is not None and name not in live]
            expect(not gone, f"{role} of pages are no longer live: {gone}")

    def _chain(self, keys: Sequence[PageKey], wait: bool = True) -> list[Page]:
        """The longest prefix that is in the tree: published pages, then (with `wait`) pending pages.

        All pages before a page of the tree are in it, and published if it is; so the last page is found by bisection, and
        the way back from there shows whether the pages are those of the prompt. Admission asks for one prompt several times
        in a row, so the last answers are kept until the tree changes.
        """
        known, version, chain = self._last_chains[wait]
        if known is not keys or version != self._version:
            chain = self._find_chain(keys, wait)
            self._last_chains[wait] = keys, self._version, chain
        return chain

    def _find_chain(self, keys: Sequence[PageKey], wait: bool) -> list[Page]:
        num = bisect_left(keys, True, key=lambda key: self._find(key, wait) is None)
        chain: list[Page] = []
        page = self._find(keys[num - 1], wait) if num else None
        for index in range(num - 1, -1, -1):
            if page is None or page.key != keys[index]:
                return self._scan(keys, wait)
            chain.append(page)
            page = page.parent
        chain.reverse()
        return chain if page is None else self._scan(keys, wait)

    def _scan(self, keys: Sequence[PageKey], wait: bool) -> list[Page]:
        """The same, page by page: digests collide, so a page of the tree may follow one that is not."""
        chain: list[Page] = []
        parent = None
        for key in keys:
            page = self._find(key, wait)
            if page is None or not page.matches(key, parent):
                break
            chain.append(page)
            parent = page
        return chain

    def _find(self, key: PageKey, wait: bool) -> Page | None:
        page = self._tree.get(key.digest)
        return page if page is None or wait or page.producer is None else None

    def _share(self, sequence: Hashable, chain: Sequence[Page], session: Session | None, prefetch: bool) -> None:
        if self.sessions.num_pinned:
            self.stats.num_pinned_hits += sum(page.pins > 0 for page in chain)
        for page in chain:
            if page.owner is not None and page.owner is not session:
                disown(page)
            if page.prefetched and not prefetch:
                page.prefetched = False
                self.stats.num_prefetched_hits += 1
            if page.producer is None:
                page.uses += 1
                continue
            if page.producer == sequence:
                raise AssertionError(f"page {page.id} would be awaited by its producer")
            page.waiters[sequence] = None
            self._awaited.setdefault(sequence, {})[page] = None
        self.stats.num_waits += bool(chain) and chain[-1].producer is not None

    def _lend(self, num: int, holder: str) -> list[int]:
        if num < 0:
            raise AssertionError(f"{num} pages were asked for")
        self.num_evicted += self._evict(num - len(self._free))
        pages = [self._free.pop() for _ in range(num)]
        for page in pages:
            self._pages[page].refs = 1
        self._count(holder, num)
        return pages

    def _publish_one(self, page: Page, key: PageKey, parent: Page | None) -> int:
        found = self._tree.get(key.digest)
        if found is None:
            self._link(page, key, parent)
            found = page
        if not found.matches(key, parent) or found.producer is not None:
            return page.id
        if found is page:
            self.stats.num_published += 1
        else:
            disown(found)
            self.stats.num_duplicates += 1
            self.retain([found.id])
            self.release([page.id])
        return found.id

    def _produce(self, producer: Hashable, page: Page) -> None:
        self._version += 1
        page.producer = producer
        self._produced.setdefault(producer, {})[page] = None

    def _stop_producing(self, page: Page) -> dict[Hashable, None]:
        """Returns the page's waiters, which the page no longer has."""
        if page.producer is None:
            return {}
        self._version += 1
        _remove(self._produced, page.producer, page)
        waiters, page.producer, page.waiters = page.waiters, None, {}
        return waiters

    def _link(self, page: Page, key: PageKey, parent: Page | None) -> None:
        self._version += 1
        page.key, page.parent, page.depth = key, parent, 1 if parent is None else parent.depth + 1
        self._tree[key.digest] = page
        self._watch.moved(key.digest)
        if parent is not None:
            parent.children[page] = None

    def _unlink(self, top: Page, reason: str) -> None:
        """Takes a page and all behind it out of the tree. Pending pages among them go on, privately."""
        self._version += 1
        before = top.parent
        if top.parent is not None:
            del top.parent.children[top]
        leaving, freed = [top], []
        for page in leaving:
            leaving += page.children
            if page.key is not None:
                del self._tree[page.key.digest]
                self._watch.moved(page.key.digest)
            if page.owner is not None or page.tips or page.pins:
                self.sessions.left(page, before, reason)
            page.key, page.parent, page.children, page.uses, page.prefetched = None, None, {}, 0, False
            if page.refs == 0:
                self._evictable.remove(page.id)
                freed.append(page.id)
        self._give_back(freed)

    def _evict(self, num: int, reason: str = "pressure") -> int:
        """Frees evictable pages, in the order of eviction, until `num` or more are freed or none is left."""
        before = len(self._free)
        if num > 0:
            self.sessions.expire()
        while self._evictable and len(self._free) < before + num:
            self._unlink(self._pages[self._evictable.victim()], reason)
        return len(self._free) - before

    def _give_back(self, freed: list[int]) -> None:
        self._free += freed
        if freed and self._on_free is not None:
            self._on_free(freed)

    def _count(self, holder: str, change: int) -> None:
        held = self.holders[holder]
        if held + change < 0:
            raise AssertionError(f"{holder} released {-change} references and held {held}")
        self.holders[holder] += change
        if not self.holders[holder]:
            del self.holders[holder]


def _remove(index: dict[Hashable, dict[Page, None]], name: Hashable, page: Page) -> None:
    del index[name][page]
    if not index[name]:
        del index[name]


def expect(right: bool, otherwise: str) -> None:
    """Raises AssertionError with this sentence unless it is right (also under `python -O`)."""
    if not right:
        raise AssertionError(otherwise)
