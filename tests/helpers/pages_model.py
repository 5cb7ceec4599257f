"""What the page manager should do, the slow way: prefixes as plain tuples, scans instead of indexes.

A prefix is (salt, *tokens), so two prefixes are the same page exactly if they are equal. pages_world.py asks both.
"""

from collections import Counter
from dataclasses import dataclass, field

from pshare_jax.engine.kv.eviction import MAX_USES


@dataclass
class SessionModel:
    parent: object = None
    tip: tuple | None = None  # the prefix at which its latest prompt ends
    owned: list = field(default_factory=list)  # the prefixes that no other has used


@dataclass
class PinModel:
    """The prefixes that it covers, one list for each prompt, with the end of a prompt first."""

    until: float
    covered: list


class PagesModel:
    """Predicts every result; only the ids of newly lent pages are taken from the real manager, and checked."""

    def __init__(self, total, max_pinned, clock):
        self.total, self.max_pinned, self.clock_now = total, max_pinned, clock
        self.sessions = {}
        self.pins = {}  # by session, the oldest first
        self.first = set()  # pages that an ended session has put first
        self.prefetched = set()
        self.num_pinned_hits = self.num_prefetched_hits = 0
        self.lapsed = Counter()
        self.refs = Counter()
        self.published = {}
        self.pending = {}
        self.producer = {}
        self.waits = {}
        self.uses = Counter()  # reservations that shared the page since it was published
        self.priority = {}  # for eviction: the least goes first, of equals the page that was released first
        self.clock = self.now = 0
        self.num_spared = 0  # evictions that spared a page that was unused for longer, since it had more uses
        self.num_cut_off = 0  # evictions of a page with published or pending ones behind it

    @property
    def cached(self):
        return [page for page in self.published.values() if not self.refs[page]]

    @property
    def num_used(self):
        return sum(count > 0 for count in self.refs.values())

    @property
    def num_free(self):
        return self.total - self.num_used - len(self.cached)

    def hits(self, prefixes):
        return sum(prefix in self.published for prefix in prefixes)

    def chain(self, prefixes):
        found = []
        for prefix in prefixes:
            page = self.published.get(prefix, self.pending.get(prefix))
            if page is None:
                break
            found.append(page)
        return found

    def retain(self, pages):
        self.refs.update(pages)

    def release(self, pages):
        for page in reversed(pages):
            assert self.refs[page] > 0
            self.refs[page] -= 1
            self.touch(page)

    def touch(self, page):
        """It is used now."""
        self.now += 1
        self.first.discard(page)
        self.priority[page] = (self.clock + 1 + min(self.uses[page], MAX_USES), self.now)

    def allocate(self, num, lent):
        """Takes what was lent (None: nothing), if that is right."""
        if num > self.num_free + len(self.cached):
            assert lent is None
            return
        assert lent is not None
        if self.num_free < num:
            self.expire()
        while self.num_free < num:
            self.evict()
        assert len(set(lent)) == num == len(lent)
        assert not any(self.refs[page] for page in lent)
        assert not set(lent) & set(self.published.values())
        assert 0 not in lent
        self.retain(lent)

    def reserve(self, name, prefixes, num, reservation, wait, caller):
        shared = self.chain(prefixes)[: None if wait else self.hits(prefixes)]
        if reservation is None:
            assert num - len(shared) > self.num_free + sum(page not in shared for page in self.cached)
            return
        self.retain(shared)
        self.first -= set(shared)
        self.allocate(num - len(shared), reservation.pages[len(shared) :])
        self.num_pinned_hits += len(self.pinned & set(prefixes[: len(shared)]))
        if not caller.prefetch:
            self.num_prefetched_hits += len(self.prefetched & set(prefixes[: len(shared)]))
            self.prefetched -= set(prefixes[: len(shared)])
        self.uses.update(page for page in shared if page not in self.producer)
        awaited = {page for page in shared if page in self.producer}
        assert reservation.pages[: reservation.num_shared] == shared
        if awaited:
            self.waits[name] = awaited
        used = list(prefixes[: len(shared)])
        for prefix, page in list(zip(prefixes, reservation.pages, strict=False))[len(shared) :]:
            if prefix in self.pending:
                break
            self.pending[prefix] = page
            self.producer[page] = name
            self.prefetched |= {prefix} if caller.prefetch else set()
            used.append(prefix)
        self.use(caller, used, len(shared))

    def use(self, caller, used, num_shared):
        """The caller's session uses these pages, the first of which it shares."""
        for name, session in self.sessions.items():
            if name != caller.session:
                session.owned = [prefix for prefix in session.owned if prefix not in used]
        if caller.session is None:
            return
        session = self.sessions.setdefault(caller.session, SessionModel())
        session.parent = session.parent if caller.parent is None else caller.parent
        session.tip = used[-1] if used else None
        session.owned += used[num_shared:]

    def publish(self, name, prefixes, pages, first, last):
        table = list(pages)
        for index in range(first, last):
            prefix, page = prefixes[index], table[index]
            if self.producer.get(page) == name:
                self.done(page)
            if index and self.published.get(prefixes[index - 1]) != table[index - 1]:
                continue
            if self.pending.get(prefix) == page:
                del self.pending[prefix]
            if prefix in self.pending:
                continue
            table[index] = self.published.setdefault(prefix, page)
            if table[index] != page:
                for session in self.sessions.values():
                    session.owned = [other for other in session.owned if other != prefix]
                self.retain(table[index : index + 1])
                self.release([page])
        return table[first:last]

    def done(self, page):
        del self.producer[page]
        self.waits = {waiter: pages - {page} for waiter, pages in self.waits.items() if pages != {page}}

    def waiters_of(self, producer):
        produced = {page for page, other in self.producer.items() if other == producer}
        return {waiter for waiter, pages in self.waits.items() if pages & produced}

    def drop(self, gone):
        """All that waited for its pages, directly or not."""
        leaving, more, lost = set(), {gone}, set()
        while more:
            leaving |= more
            lost = {page for page, producer in self.producer.items() if producer in leaving}
            more = {waiter for waiter, pages in self.waits.items() if pages & lost} - leaving
        self.waits = {waiter: pages for waiter, pages in self.waits.items() if waiter not in leaving}
        for page in lost:
            del self.producer[page]
            for prefix in [prefix for prefix, other in self.pending.items() if other == page]:
                self.unlink(prefix, "unwritten")
        return leaving - {gone}

    def adopt(self, adopter, producer, pages):
        self.producer.update({page: adopter for page in pages if self.producer.get(page) == producer})

    @property
    def evictable(self):
        """In the order of eviction: first what ended sessions have put first, last what is pinned, both by time alone."""
        pinned = {self.published[prefix] for prefix in self.pinned if prefix in self.published}

        def place(page):
            rank = 0 if page in self.first else 2 if page in pinned else 1
            return (rank, *self.priority[page]) if rank == 1 else (rank, 0, self.priority[page][1])

        return sorted(self.cached, key=place)

    def evict(self, reason="pressure"):
        first = self.evictable[0]
        if first in self.first or self.pinned & {prefix for prefix, page in self.published.items() if page == first}:
            self.unlink(next(prefix for prefix, page in self.published.items() if page == first), reason)
            return
        self.clock = self.priority[first][0]
        self.num_spared += any(self.priority[page][1] < self.priority[first][1] for page in self.cached)
        top = next(prefix for prefix, page in self.published.items() if page == first)
        self.unlink(top, reason)

    def unlink(self, top, reason):
        before = next((prefix for prefix in reversed(self.up(top)) if prefix != top), None)
        gone = [prefix for prefix in (*self.published, *self.pending) if prefix[: len(top)] == top]
        if reason != "unwritten":
            self.num_cut_off += len(gone) > 1
        self.lapsed[reason] += len(self.pinned & set(gone))
        for prefix in gone:
            page = self.published.pop(prefix, None) or self.pending.pop(prefix, None)
            del self.uses[page]
            self.first.discard(page)
        self.prefetched -= set(gone)
        for session in self.sessions.values():
            session.owned = [prefix for prefix in session.owned if prefix not in gone]
            session.tip = before if session.tip in gone else session.tip
        for pin in self.pins.values():
            pin.covered = [[prefix for prefix in prompt if prefix not in gone] for prompt in pin.covered]

    # Sessions

    def up(self, tip):
        """The prefixes of pages up to this one, the first page first."""
        if tip is None:
            return []
        pages = [prefix for prefix in (*self.published, *self.pending) if tip[: len(prefix)] == prefix]
        return sorted(pages, key=len)

    @property
    def pinned(self):
        return {prefix for pin in self.pins.values() for prompt in pin.covered for prefix in prompt}

    def page(self, prefix):
        return self.published.get(prefix, self.pending.get(prefix))

    def family(self, name):
        found = []
        while name in self.sessions and name not in found:
            found.append(name)
            name = self.sessions[name].parent
        return [self.up(self.sessions[name].tip)[::-1] for name in found]

    def touch_all(self, prefixes):
        for prefix in prefixes:
            self.touch(self.page(prefix))

    def pin(self, name, seconds):
        if name not in self.sessions or not self.max_pinned:
            return
        self.expire()
        before, old = self.pinned, self.pins.pop(name, None)
        covered = [list(prompt) for prompt in self.family(name) if prompt]
        if seconds > 0 and covered:
            self.pins[name] = PinModel(self.clock_now() + seconds, covered)
            for prompt in reversed(covered):
                self.touch_all(prompt)
        if old is not None:
            self.lapse(old, before, "replaced")
        while len(self.pinned) > self.max_pinned and len(self.pins) > 1:
            self.end_pin(next(iter(self.pins)), "share")
        for pin in self.pins.values():
            for prompt in reversed(pin.covered):
                while len(self.pinned) > self.max_pinned and prompt:
                    before, end = self.pinned, prompt.pop(0)
                    self.lapse(PinModel(0, [[end]]), before, "share")

    def lapse(self, pin, before, reason):
        """What a pin covered, and no other does, goes back among the others."""
        gone = before - self.pinned
        self.lapsed[reason] += len(gone)
        last = {prefix: number for number, prompt in enumerate(pin.covered) for prefix in prompt}
        for number, prompt in enumerate(pin.covered):
            self.touch_all(prefix for prefix in prompt if prefix in gone and last[prefix] == number)

    def end_pin(self, name, reason):
        before, pin = self.pinned, self.pins.pop(name, None)
        if pin is not None:
            self.lapse(pin, before, reason)

    def expire(self):
        order = {name: age for age, name in enumerate(self.pins)}
        for name in sorted(self.pins, key=lambda name: (self.pins[name].until, order[name])):
            if self.pins[name].until <= self.clock_now():
                self.end_pin(name, "expired")

    def refresh(self, name):
        for prompt in reversed(self.family(name)):
            self.touch_all(prompt)

    def evict_session(self, name):
        if name not in self.sessions:
            return
        self.sessions[name].tip = None
        self.end_pin(name, "ended")
        for prefix in reversed(self.sessions[name].owned):
            page = self.page(prefix)
            if not self.refs[page] and prefix not in self.pinned and page not in self.first:
                self.touch(page)
                self.first.add(page)
