"""Sessions in one pool: which pages only one session has used, where its latest prompt ends, and what is pinned.

PageManager reports the pages that are used and that leave; the ledger pins and evicts when a request has ended. All is
called under the engine's lock, and a call takes time by the pages of the sessions that it names, not by those of the pool.
"""

import itertools
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pshare_jax.engine.kv.eviction import EvictionOrder
from pshare_jax.engine.kv.page import Page

MAX_SESSIONS = 16_384
MAX_FAMILY = 16
"""A session with so many of its parents: a call may name sessions without end."""
MAX_FAMILY_PAGES = 4096
"""The pages of all their prompts, at most, unless the session alone has more: a call is about no others, since it takes about
a microsecond of the engine's lock for each.
"""


class Caller(NamedTuple):
    """Who reserves pages: the name of its session and that of its parent, if any, and whether it only prefetches."""

    session: Hashable | None = None
    parent: Hashable | None = None
    prefetch: bool = False


NOBODY = Caller()


class Tip:
    """The last page of a prompt that is in the tree; it moves back to the page before when pages leave, in the end to None."""

    __slots__ = ("page",)

    def __init__(self, page: Page | None = None):
        self.page: Page | None = None
        self.move(page)

    def move(self, page: Page | None) -> None:
        """The prompt ends at this page."""
        if self.page is not None:
            del self.page.tips[self]
        self.page = page
        if page is not None:
            page.tips[self] = None


@dataclass(eq=False, slots=True)
class Pin:
    """The pages up to these tips are evicted last until then. `number` is its age."""

    session: "Session"
    until: int | float
    number: int
    tips: list[Tip]


@dataclass(eq=False, slots=True)
class Session:
    """What a pool has of a session; `owned` are the pages that no other has used, beginnings before ends."""

    parent: Hashable | None = None
    tip: Tip = field(default_factory=Tip)
    owned: dict[Page, None] = field(default_factory=dict)
    pin: Pin | None = None


class Sessions:
    """The most recently used `MAX_SESSIONS` sessions of a pool, by name, and their pins.

    A pin covers a session's latest prompt and those of its parents: whole prefixes, so that a page before a pinned page is
    pinned. At most `max_pinned` pages are pinned; beyond that the oldest pins lapse. `clock` counts seconds.
    """

    def __init__(self, order: EvictionOrder, lapsed: Counter[str], max_pinned: int, clock: Callable[[], float]):
        """`lapsed` counts the pages that are no longer pinned, by reason."""
        self._order, self._lapsed, self._max_pinned, self._clock = order, lapsed, max_pinned, clock
        self._by_name: OrderedDict[Hashable, Session] = OrderedDict()
        self._pins: OrderedDict[Pin, None] = OrderedDict()  # the oldest first
        self._by_expiry: list[Pin] = []
        self._numbers = itertools.count()
        self.num_pinned = 0
        """Pinned pages; those of pins that have expired since the last call are among them."""

    def of(self, caller: Caller) -> Session | None:
        """The session that uses pages now; None if the caller has none."""
        name, parent, _ = caller
        if name is None:
            return None
        session = self._by_name.get(name)
        if session is None:
            session = self._by_name[name] = Session()
        self._by_name.move_to_end(name)
        if parent is not None:
            session.parent = parent
        if len(self._by_name) > MAX_SESSIONS:
            _, oldest = self._by_name.popitem(last=False)
            oldest.tip.move(None)
            self._end_pin(oldest, "forgotten")
        return session

    def add(self, page: Page) -> None:
        """The page has lost its last reference, or counts as used now."""
        if page.pins:
            self._order.add_last(page.id)
        else:
            self._order.add(page.id, page.uses)

    def left(self, page: Page, before: Page | None, reason: str) -> None:
        """The page has left the tree; `before` is the last page before it that stays."""
        disown(page)
        for tip in list(page.tips):
            tip.move(before)
        if page.pins:
            page.pins = 0
            self._unpinned(reason)

    def pin(self, name: Hashable, seconds: int | float) -> None:
        """Pins the pages of a session and its parents for so long from now, instead of what it had pinned; 0: nothing."""
        session = self._by_name.get(name)
        if session is None or not self._max_pinned:
            return
        self.expire()
        old, session.pin = session.pin, self._begin_pin(name, session, seconds) if seconds > 0 else None
        if old is not None:
            self._lapse(old, "replaced")
        self._keep_to_share()

    def refresh(self, name: Hashable) -> None:
        """The pages of a session and its parents count as used now."""
        for session in reversed(list(self._family(name))):
            for page in _back(session.tip.page):
                if page.refs == 0:
                    self.add(page)

    def evict(self, name: Hashable) -> int:
        """The session has ended: its pin ends, and unused pages that only it has used go first, unless others pin them.
        Returns their number.
        """
        session = self._by_name.get(name)
        if session is None:
            return 0
        session.tip.move(None)
        self._end_pin(session, "ended")
        pages = [
            page
            for page in reversed(session.owned)
            if page.refs == 0 and not page.pins and not self._order.is_first(page.id)
        ]
        for page in pages:
            self._order.add_first(page.id)
        return len(pages)

    def expire(self) -> None:
        """Lapses the pins whose time is over."""
        if self._by_expiry:
            now = self._clock()
            while self._by_expiry and self._by_expiry[0].until <= now:
                self._end_pin(self._by_expiry[0].session, "expired")

    def check(self, pages: Iterable[Page]) -> list[str]:
        """What is wrong with pins, tips and owners (no names of pages: the caller knows the pool)."""
        pages = list(pages)
        tips = [session.tip for session in self._by_name.values()]
        pinned = Counter(page for pin in self._pins for tip in pin.tips for page in _back(tip.page))
        tips += [tip for pin in self._pins for tip in pin.tips]
        expected = {(tip, tip.page) for tip in tips if tip.page is not None}
        faults = {
            "pages count other pins than there are": any(page.pins != pinned[page] for page in pages),
            f"{self.num_pinned} pages count as pinned, {len(pinned)} are": self.num_pinned != len(pinned),
            f"more than {self._max_pinned} pages are pinned": len(pinned) > self._max_pinned,
            "tips and pages disagree": {(tip, page) for page in pages for tip in page.tips} != expected,
            "a tip is not in the tree": any(page.key is None for _, page in expected),
            "the two lists of pins disagree": self._by_expiry != sorted(self._pins, key=_expiry),
            "a session's pin is not listed": any(pin.session.pin is not pin for pin in self._pins),
            "a session owns a page that is not its own": any(
                page.owner is not session for session in self._by_name.values() for page in session.owned
            ),
            "a page has an owner that does not own it": any(
                page.owner is not None and (page.key is None or page not in page.owner.owned) for page in pages
            ),
        }
        return [fault for fault, found in faults.items() if found]

    def _family(self, name: Hashable | None) -> Iterator[Session]:
        """The session, its parent, that one's parent, ..., as far as they are known and their prompts are not too long."""
        seen: set[Hashable] = set()
        num_pages = 0
        while name not in seen and len(seen) < MAX_FAMILY and (session := self._by_name.get(name)) is not None:
            num_pages += 0 if session.tip.page is None else session.tip.page.depth
            if seen and num_pages > MAX_FAMILY_PAGES:
                return
            seen.add(name)
            yield session
            name = session.parent

    def _begin_pin(self, name: Hashable, session: Session, seconds: int | float) -> Pin | None:
        tips = [Tip(one.tip.page) for one in self._family(name) if one.tip.page is not None]
        if not tips:
            return None
        pin = Pin(session, self._clock() + seconds, next(self._numbers), tips)
        # Its own pages last: of pinned pages they are the most recently used.
        for tip in reversed(tips):
            self._cover(tip)
        self._pins[pin] = None
        insort(self._by_expiry, pin, key=_expiry)
        return pin

    def _cover(self, tip: Tip) -> None:
        """Counts a pin's tip; the pages move to the end of the order, ends before beginnings."""
        for page in _back(tip.page):
            page.pins += 1
            self.num_pinned += page.pins == 1
            if page.refs == 0:
                self._order.add_last(page.id)

    def _uncover(self, pages: Iterable[Page], reason: str) -> None:
        for page in pages:
            page.pins -= 1
            if page.pins == 0:
                self._unpinned(reason)
                if page.refs == 0:
                    self.add(page)

    def _unpinned(self, reason: str) -> None:
        self.num_pinned -= 1
        self._lapsed[reason] += 1

    def _end_pin(self, session: Session, reason: str) -> None:
        pin, session.pin = session.pin, None
        if pin is not None:
            self._lapse(pin, reason)

    def _lapse(self, pin: Pin, reason: str) -> None:
        del self._pins[pin]
        del self._by_expiry[bisect_left(self._by_expiry, _expiry(pin), key=_expiry)]
        for tip in pin.tips:
            self._uncover(_back(tip.page), reason)
            tip.move(None)

    def _keep_to_share(self) -> None:
        """Too many pages are pinned: the oldest pins lapse, and the last pin loses ends, those of parents first."""
        while self.num_pinned > self._max_pinned and len(self._pins) > 1:
            self._end_pin(next(iter(self._pins)).session, "share")
        for tip in reversed(next(iter(self._pins)).tips if self._pins else ()):
            while self.num_pinned > self._max_pinned and (page := tip.page) is not None:
                tip.move(page.parent)
                self._uncover([page], "share")


def disown(page: Page) -> None:
    """The page has another user, or leaves."""
    if page.owner is not None:
        del page.owner.owned[page]
        page.owner = None


def _back(page: Page | None) -> Iterator[Page]:
    """The page and all before it, the last first."""
    while page is not None:
        yield page
        page = page.parent


def _expiry(pin: Pin) -> tuple[int | float, int]:
    return pin.until, pin.number
