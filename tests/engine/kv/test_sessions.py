"""sessions.py: pins beyond the share, forgotten sessions, and calls about sessions that a pool does not know."""

import pytest

from pshare_jax.engine.kv import sessions as sessions_module
from pshare_jax.engine.kv.keys import page_keys
from pshare_jax.engine.kv.page_manager import PageManager
from pshare_jax.engine.kv.sessions import Caller

pytestmark = pytest.mark.host
SIZE = 2


class Pool:
    """A manager with a clock that the test moves."""

    def __init__(self, num_pages=101, max_pinned=20):
        self.now = 0.0
        self.manager = PageManager(num_pages, None, None, max_pinned, lambda: self.now)
        self.sessions = self.manager.sessions

    def serve(self, prompt, num_pages, session=None, parent=None):
        """A request from reservation to release; returns its hits."""
        keys = page_keys("base", "", [prompt] * (SIZE * num_pages), SIZE)
        reservation = self.manager.reserve("a", keys, num_pages + 1, True, Caller(session, parent))
        assert reservation is not None
        table, first = reservation.pages, reservation.num_shared
        table[first:num_pages] = self.manager.publish("a", keys, table, first, num_pages)
        self.manager.release(table)
        self.manager.check(())
        return first

    def pin(self, session, seconds=60):
        self.sessions.pin(session, seconds)
        self.manager.check(())
        return self.sessions.num_pinned

    @property
    def lapsed(self):
        return dict(self.manager.stats.num_lapsed)


def test_the_oldest_pins_lapse_whole_and_the_last_loses_its_ends():
    pool = Pool()
    for name in range(3):
        pool.serve(name, 8, name)
    assert [pool.pin(name) for name in range(3)] == [8, 16, 16]
    # Renewed, a pin is the last.
    assert pool.pin(1) == 16
    pool.serve(3, 5, 3)
    assert pool.pin(3) == 13
    assert pool.lapsed == {"share": 16}
    pool.serve(4, 30, 4)
    assert pool.pin(4) == 20
    pool.serve(50, 79)
    assert pool.serve(4, 30) == 20


def test_ends_of_parents_go_before_those_of_the_session_itself():
    pool = Pool()
    pool.serve(0, 15, "parent")
    pool.serve(1, 15, "child", "parent")
    assert pool.pin("child") == 20
    pool.serve(50, 79)
    assert (pool.serve(0, 15), pool.serve(1, 15)) == (5, 15)


def test_parents_that_name_each_other_are_pinned_once():
    pool = Pool()
    pool.serve(0, 4, "a", "b")
    pool.serve(1, 4, "b", "a")
    pool.serve(2, 4, "c", "c")
    assert [pool.pin(name) for name in "abc"] == [8, 8, 12]
    pool.sessions.refresh("a")
    pool.manager.check(())


def test_a_family_has_an_end(monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_FAMILY", 3)
    pool = Pool()
    for name in range(5):
        pool.serve(name, 2, name, name - 1)
    assert pool.pin(4) == 6


def test_a_family_ends_before_its_prompts_are_too_many_pages(monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_FAMILY_PAGES", 7)
    pool = Pool()
    for name, num_pages in enumerate((2, 3, 3, 2, 9)):
        pool.serve(name, num_pages, name, name - 1)
    # The session itself counts whole.
    pinned = []
    for name in range(5):
        pinned.append(pool.pin(name))
        assert pool.pin(name, 0) == 0
    assert pinned == [2, 5, 6, 5, 9]


def test_pins_expire_in_the_order_of_their_times():
    pool = Pool()
    for name, seconds in enumerate((30, 10, 20)):
        pool.serve(name, 4, name)
        pool.pin(name, seconds)
    left = []
    for pool.now in (9.9, 10.0, 20.0, 29.9, 30.0):
        pool.sessions.expire()
        left.append(pool.sessions.num_pinned)
    assert left == [12, 8, 4, 4, 0]
    assert pool.lapsed == {"expired": 12}


def test_only_the_last_sessions_are_remembered(monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_SESSIONS", 3)
    pool = Pool()
    for name in range(4):
        pool.serve(name, 2, name)
        pool.pin(name)
    assert pool.lapsed == {"forgotten": 2}
    pool.manager.evict_session(0)
    assert pool.manager.stats.num_put_first == 0
    # Its pages are still those of a session that has been; another session of the name is another.
    assert pool.serve(0, 2, 0) == 2
    pool.manager.evict_session(0)
    assert pool.manager.stats.num_put_first == 0
    pool.serve(40, 97)
    pool.manager.check(())


def test_unknown_sessions_and_sessions_without_pages_are_let_be():
    pool = Pool()
    pool.serve(0, 4)
    assert pool.pin("unknown") == 0
    pool.sessions.refresh("unknown")
    pool.manager.evict_session("unknown")
    pool.serve(0, 0, "empty")
    assert pool.pin("empty") == 0
    pool.manager.evict_session("empty")
    pool.manager.check(())


def test_without_a_share_nothing_is_pinned():
    pool = Pool(max_pinned=0)
    pool.serve(0, 4, "a")
    assert pool.pin("a") == 0


def test_a_session_that_ends_takes_no_page_from_a_child_that_pins_it():
    pool = Pool()
    pool.serve(0, 4, "parent")
    pool.serve(1, 4, "child", "parent")
    assert pool.pin("child") == 8
    pool.manager.evict_session("parent")
    pool.manager.check(())
    assert (pool.sessions.num_pinned, pool.manager.stats.num_put_first) == (8, 0)
    pool.manager.evict_session("child")
    assert (pool.sessions.num_pinned, pool.manager.stats.num_put_first) == (0, 4)
