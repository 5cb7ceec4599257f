"""Sequences, transfers and pins that live on one PageManager, as the engine would drive them.

Content is tracked as the engine would write it: a page holds the prefix whose KV was written last, nothing once freed.
With a PagesModel beside it every result is compared. test_pages_machine.py chooses the actions.
"""

import random
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

from pages_model import PagesModel

from pshare_jax.engine.kv.keys import page_keys
from pshare_jax.engine.kv.page_manager import PageManager
from pshare_jax.engine.kv.sessions import NOBODY
from pshare_jax.share.boundary import base_len

SIZE = 2


@dataclass
class Live:
    """A sequence or a transfer: its table, how far it is produced, and the content it relies on by page."""

    prefixes: list
    keys: list
    table: list
    made: int
    last: int
    holder: str = "sequence"
    content: dict = field(default_factory=dict)


class PagesWorld:
    """Every action takes plain values; `choice` picks among what is possible, and nothing possible is no action."""

    def __init__(self, num_pages, exact=True, loose_pins=False):
        self.now = 0.0
        self.max_pinned = num_pages // 4
        self.manager = PageManager(num_pages, self._erase, None, self.max_pinned, self._clock)
        self.model = PagesModel(num_pages - 1, self.max_pinned, self._clock) if exact else None
        self.must_be_last = set()  # pages that may be freed only if no other could be
        self.loose_pins = loose_pins
        self.live = {}
        self.private = []
        self.pins = []
        self.content = {}
        self.seen = Counter()

    # Sequences

    def reserve(self, prompt, salt="", tail=1, lookup=True, wait=True, caller=NOBODY):
        """A request is admitted if it fits. Without lookup it produces all pages itself, unregistered."""
        keys = page_keys("base", salt, prompt[: base_len(len(prompt))], SIZE)
        prefixes = [(salt, *prompt[: SIZE * (index + 1)]) for index in range(len(keys))]
        asked, num = keys if lookup else [], len(keys) + tail
        name = f"sequence {self.seen['sequences']}"
        self.seen["sequences"] += 1
        evicted, hits = self.manager.num_evicted, self.manager.num_hits(asked)
        shareable = self.manager.num_shareable(asked) if wait else hits
        fits = [self.manager.could_reserve(asked, num, spare, wait) for spare in range(self.manager.num_pages)]
        with self._pressure():
            reservation = self.manager.reserve(name, asked, num, wait, caller)
        left = -1 if reservation is None else self.manager.num_available
        assert fits == [left >= spare for spare in range(self.manager.num_pages)]
        assert reservation is None or reservation.num_shared == shareable
        self._expect("reserve", name, prefixes if lookup else [], num, reservation, wait, caller)
        self.seen["evicted"] += self.manager.num_evicted - evicted
        self.seen["refused"] += reservation is None
        if reservation is None:
            return
        first = reservation.num_shared
        self.live[name] = Live(prefixes, keys, reservation.pages, first, len(keys))
        self._rely(self.live[name], hits)
        self.seen.update(hits=hits, waits=first - hits)
        self.seen["hit, wait and own"] += 0 < hits < first < len(asked)
        self.seen["did not wait"] += self.manager.num_shareable(asked) > first and not wait

    def publish(self, choice, num):
        """A sequence or transfer that waits for no page gets some more pages written and published."""
        name = self._pick(choice, self._can_publish)
        if name is None:
            return
        live = self.live[name]
        first, last = live.made, min(live.made + num, live.last)
        self._rely(live, first)  # what it waited for is there now
        for page, prefix in list(zip(live.table, live.prefixes, strict=False))[first:last]:
            assert self.content.setdefault(page, prefix) == prefix
        expected = self._expect("publish", name, live.prefixes, live.table, first, last)
        used = self.manager.publish(name, live.keys, live.table, first, last)
        assert expected in (None, used)
        self.seen["duplicates"] += used != live.table[first:last]
        self.seen["private"] += self.manager.num_hits(live.keys) < last
        self.seen["published"] += 1
        live.table[first:last] = used
        live.made = last
        self._rely(live, last)

    def finish(self, choice):
        """A sequence that has produced all its pages ends."""
        name = self._pick(choice, lambda name: not self.manager.waiting(name) and not self._can_publish(name))
        if name is not None:
            assert self.manager.drop(name) == []
            self._release(name)

    def abort(self, choice):
        """A sequence or transfer fails in any state; all that wait for it go too."""
        name = self._pick(choice, lambda name: True)
        if name is not None:
            self._drop(name, choice)

    def _drop(self, name, choice):
        expected = self._expect("drop", name)
        dropped = self.manager.drop(name)
        assert expected in (None, set(dropped))
        assert len(set(dropped)) == len(dropped)
        self.seen.update(dropped=len(dropped), dropped_more=len(dropped) > 1)
        leaving = [name, *dropped]
        random.Random(choice).shuffle(leaving)
        for gone in leaving:
            assert self.manager.drop(gone) == []
            self._release(gone)

    # Transfers and pins

    def leave_a_transfer(self, choice, num):
        """A sequence is aborted while a transfer of its next pages is in flight, which adopts them."""
        name = self._pick(choice, lambda name: self._can_publish(name) and self.live[name].holder == "sequence")
        if name is None:
            return
        live, transfer = self.live[name], f"transfer of {name}"
        self._rely(live, live.made)
        last = min(live.made + num, live.last)
        table = live.table[:last]
        self.manager.retain(table, "transfer")
        self._expect("retain", table)
        self.seen["adopted"] += self.manager.has_waiters(table)
        self.manager.adopt(transfer, name, table)
        self._expect("adopt", transfer, name, table)
        content = {page: live.content[page] for page in table[: live.made]}
        self.live[transfer] = Live(live.prefixes, live.keys, table, live.made, last, "transfer", content)
        self._drop(name, choice)

    def pin(self, choice, cut):
        """The pages produced so far are held, from the first; a loose pin, against the rule, holds any part."""
        name = self._pick(choice, lambda name: True)
        if name is not None:
            live = self.live[name]
            pages = live.table[cut // 2 : cut] if self.loose_pins else live.table[: min(cut, live.made)]
            self.manager.retain(pages, "pin")
            self._expect("retain", pages)
            self.pins.append(pages)

    def unpin(self, choice):
        """One pin is released."""
        if self.pins:
            pages = self.pins.pop(choice % len(self.pins))
            self.manager.release(pages, "pin")
            self._expect("release", pages)

    # Sessions

    def pin_session(self, name, seconds):
        """The session's pages are evicted last for some time."""
        self.manager.sessions.pin(name, seconds)
        self._expect("pin", name, seconds)
        self.seen["pinned"] += self.manager.sessions.num_pinned

    def refresh(self, name):
        """A child of the session has used its pages."""
        self.manager.sessions.refresh(name)
        self._expect("refresh", name)

    def end_session(self, name):
        """The session's own pages go first."""
        self.manager.evict_session(name)
        self._expect("evict_session", name)

    def wait(self, seconds):
        """Time passes."""
        self.now += seconds

    # Pressure

    def allocate(self, num):
        """Private pages, as decoding takes them."""
        evicted = self.manager.num_evicted
        with self._pressure():
            pages = self.manager.allocate(num)
        self._expect("allocate", num, pages)
        self.seen["evicted"] += self.manager.num_evicted - evicted
        if pages is not None:
            assert not any(page in self.content for page in pages), "a lent page still has content"
            self.private.append(pages)

    def free(self, choice):
        """Some private pages are released."""
        if self.private:
            pages = self.private.pop(choice % len(self.private))
            self.manager.release(pages)
            self._expect("release", pages)

    def flush(self):
        """All unreferenced pages are freed."""
        num_cached = self.manager.num_cached
        assert self.manager.flush() == num_cached
        assert self.manager.num_cached == 0
        if self.model and self.model.cached:
            self.model.expire()
        while self.model and self.model.cached:
            self.model.evict("flushed")

    # Always

    def check(self):
        """The invariants hold, no content that is relied on has changed, and all is as the model says."""
        self.manager.check(self.live)
        for live in self.live.values():
            assert all(self.content[page] == prefix for page, prefix in live.content.items()), "content changed"
        if self.model is None:
            return
        real, model = self.manager, self.model
        states = (model.num_free, len(model.cached), model.num_used)
        assert (real.num_free, real.num_cached, real.num_used) == states
        assert list(real._evictable) == model.evictable
        assert {page.id for page in real._pages if page.pins} == {model.page(prefix) for prefix in model.pinned}
        assert len(model.pinned) == real.sessions.num_pinned <= self.max_pinned
        stats = real.stats
        assert +stats.num_lapsed == +model.lapsed
        assert (stats.num_pinned_hits, stats.num_prefetched_hits) == (model.num_pinned_hits, model.num_prefetched_hits)
        owners = {page.id: page.owner for page in real._pages if page.owner is not None}
        assert set(owners) == {model.page(prefix) for session in model.sessions.values() for prefix in session.owned}
        assert {page.id for page in real._tree.values()} == {*model.published.values(), *model.pending.values()}
        assert {page.id: page.producer for page in real._pages if page.producer} == model.producer
        for name, live in self.live.items():
            assert self.manager.waiting(name) == (name in model.waits)
            assert set(self.manager.waiters_of(name)) == model.waiters_of(name)
            assert self.manager.num_hits(live.keys) == model.hits(live.prefixes)
            assert self.manager.num_shareable(live.keys) == len(model.chain(live.prefixes))
        if not self.loose_pins:
            assert model.num_cut_off == 0, "a beginning was evicted before its end"

    def end(self):
        """All sequences, transfers and pins go: every page is free."""
        self.seen["spared"] += self.model is None or self.model.num_spared
        stats = self.manager.stats
        reasons = ("expired", "share", "pressure", "replaced", "ended")
        self.seen.update({reason: stats.num_lapsed[reason] for reason in reasons})
        self.seen.update(pinned_hits=stats.num_pinned_hits, prefetched_hits=stats.num_prefetched_hits)
        self.seen["put first"] += stats.num_put_first
        while self.live:
            self.abort(0)
        while self.pins:
            self.unpin(0)
        while self.private:
            self.free(0)
        self.manager.check(())
        assert not self.manager.holders
        assert self.manager.num_free + self.manager.num_cached == self.manager.num_pages - 1
        self.flush()
        assert self.manager.num_free == self.manager.num_pages - 1
        assert not self.content

    def _erase(self, pages):
        for page in pages:
            self.content.pop(page, None)
        if not self.loose_pins and self.must_be_last & set(pages):
            others = set(self.manager._evictable) - self.must_be_last
            assert not others, "a pinned page was evicted before another"
            self.seen["under pressure"] += 1

    @contextmanager
    def _pressure(self):
        """Pages that are evicted meanwhile are pinned only if no other is left."""
        pins = [pin for pin in self.manager.sessions._pins if pin.until > self.now]
        ends = [tip.page for pin in pins for tip in pin.tips]
        while ends:
            self.must_be_last |= {page.id for page in ends if page is not None}
            ends = [page.parent for page in ends if page is not None]
        yield
        self.must_be_last.clear()

    def _clock(self):
        return self.now

    def _expect(self, method, *args):
        return getattr(self.model, method)(*args) if self.model else None

    def _pick(self, choice, possible):
        names = [name for name in self.live if possible(name)]
        return names[choice % len(names)] if names else None

    def _can_publish(self, name):
        return self.live[name].made < self.live[name].last and not self.manager.waiting(name)

    def _rely(self, live, num):
        for page, prefix in list(zip(live.table, live.prefixes, strict=False))[:num]:
            assert self.content[page] == prefix, "a page has other tokens"
            live.content[page] = prefix

    def _release(self, name):
        live = self.live.pop(name)
        self._expect("release", live.table)
        self.manager.release(live.table, live.holder)
