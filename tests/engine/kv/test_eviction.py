"""eviction.py: reused pages outlast one-off prompts, but no page stays for ever. The exact order: test_pages_machine.py."""

import itertools

import pytest

from pshare_jax.engine.kv.eviction import MAX_USES, EvictionOrder
from pshare_jax.engine.kv.keys import page_keys
from pshare_jax.engine.kv.page_manager import PageManager

pytestmark = pytest.mark.host
SIZE = 2


def keys_of(name, num_pages):
    """The keys of a prompt that shares nothing with prompts of other names."""
    return page_keys("base", "", [name] * (SIZE * num_pages), SIZE)


def serve(manager, keys):
    """A request with these full pages and a tail: prefilled, published, released. Returns the number of hits."""
    reservation = manager.reserve("a", keys, len(keys) + 1)
    assert reservation is not None
    table, first = reservation.pages, reservation.num_shared
    table[first : len(keys)] = manager.publish("a", keys, table, first, len(keys))
    manager.release(table)
    manager.check(())
    return first


def test_more_uses_leave_later_and_equal_uses_by_time():
    order = EvictionOrder()
    for page, uses in ((1, 0), (2, 1), (3, 0), (4, MAX_USES + 1), (5, 1), (6, MAX_USES)):
        order.add(page, uses)
    assert len(order) == 6
    order.remove(1)
    order.add(1, 0)
    assert list(order) == [3, 1, 2, 5, 4, 6]
    victims = []
    while order:
        victims.append(order.victim())
        order.remove(victims[-1])
    assert victims == [3, 1, 2, 5, 4, 6]


def test_a_page_outlasts_as_many_turnovers_of_unused_pages_as_it_was_used():
    order, unused = EvictionOrder(), itertools.count(100)
    for uses in range(MAX_USES + 3):
        order.add(uses, uses)
    for page in itertools.islice(unused, 3):
        order.add(page, 0)
    num_evicted, outlasted = 0, {}
    while len(outlasted) < MAX_USES + 3:
        page = order.victim()
        order.remove(page)
        if page < 100:
            outlasted[page] = num_evicted // 3
        else:
            num_evicted += 1
            order.add(next(unused), 0)
    assert outlasted == {uses: min(uses, MAX_USES) for uses in range(MAX_USES + 3)}


def test_a_one_off_prompt_as_long_as_the_cache_does_not_flush_the_sessions():
    manager = PageManager(101)
    sessions = [keys_of(name, 12) for name in range(3)]
    for num_pages in (4, 8, 12):  # three turns each: the first 8 pages are used again
        for keys in sessions:
            serve(manager, keys[:num_pages])
    for name in range(10, 14):
        serve(manager, keys_of(name, 10))
    num_free, num_cached = manager.num_free, manager.num_cached
    assert (num_free, num_cached) == (24, 76)
    assert serve(manager, keys_of(20, num_cached - 1)) == 0
    assert [manager.num_hits(keys) for keys in sessions] == [8, 8, 8]


def test_a_session_that_ended_is_evicted_in_the_end_while_a_live_session_stays():
    manager = PageManager(101)
    ended, live = keys_of(0, 40), keys_of(1, 20)
    for _ in range(20):
        serve(manager, ended)
        serve(manager, live)
    hits = []
    for name in range(2, 2 + MAX_USES * 10):  # prompts of 10 pages: in all, MAX_USES pools
        serve(manager, keys_of(name, 10))
        assert serve(manager, live) == 20
        hits.append(manager.num_hits(ended))
    assert hits[10] == 40, "flushed by the first 100 pages"
    assert hits[-1] == 0, "kept for ever"


def test_a_refused_reservation_leaves_the_order_alone():
    manager = PageManager(11)
    old, new = keys_of(0, 4), keys_of(1, 4)
    serve(manager, old)
    serve(manager, new)
    before = list(manager._evictable)
    assert manager.reserve("b", old, 11) is None
    assert list(manager._evictable) == before
