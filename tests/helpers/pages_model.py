"""What the page manager should do, the slow way: prefixes as plain tuples, scans instead of indexes.

A prefix is (salt, *tokens), so two prefixes are the same page exactly if they are equal. pages_world.py asks both.
"""

from collections import Counter

from pshare_jax.engine.kv.eviction import MAX_USES


class PagesModel:
    """Predicts every result; only the ids of newly lent pages are taken from the real manager, and checked."""

    def __init__(self, total):
        self.total = total
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
            self.now += 1
            self.priority[page] = (self.clock + 1 + min(self.uses[page], MAX_USES), self.now)

    def allocate(self, num, lent):
        """Takes what was lent (None: nothing), if that is right."""
        if num > self.num_free + len(self.cached):
            assert lent is None
            return
        assert lent is not None
        while self.num_free < num:
            self.evict()
        assert len(set(lent)) == num == len(lent)
        assert not any(self.refs[page] for page in lent)
        assert not set(lent) & set(self.published.values())
        assert 0 not in lent
        self.retain(lent)

    def reserve(self, name, prefixes, num, reservation, wait):
        shared = self.chain(prefixes)[: None if wait else self.hits(prefixes)]
        if reservation is None:
            assert num - len(shared) > self.num_free + sum(page not in shared for page in self.cached)
            return
        self.retain(shared)
        self.allocate(num - len(shared), reservation.pages[len(shared) :])
        self.uses.update(page for page in shared if page not in self.producer)
        awaited = {page for page in shared if page in self.producer}
        assert reservation.pages[: reservation.num_shared] == shared
        if awaited:
            self.waits[name] = awaited
        for prefix, page in list(zip(prefixes, reservation.pages, strict=False))[len(shared) :]:
            if prefix in self.pending:
                break
            self.pending[prefix] = page
            self.producer[page] = name

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
                self.unlink(prefix)
        return leaving - {gone}

    def adopt(self, adopter, producer, pages):
        self.producer.update({page: adopter for page in pages if self.producer.get(page) == producer})

    @property
    def evictable(self):
        """In the order of eviction."""
        return sorted(self.cached, key=lambda page: self.priority[page])

    def evict(self):
        first = self.evictable[0]
        self.clock = self.priority[first][0]
        self.num_spared += any(self.priority[page][1] < self.priority[first][1] for page in self.cached)
        top = next(prefix for prefix, page in self.published.items() if page == first)
        self.num_cut_off += sum(prefix[: len(top)] == top for prefix in (*self.published, *self.pending)) > 1
        self.unlink(top)

    def unlink(self, top):
        for prefixes in (self.published, self.pending):
            for prefix in [prefix for prefix in prefixes if prefix[: len(top)] == top]:
                del self.uses[prefixes.pop(prefix)]
