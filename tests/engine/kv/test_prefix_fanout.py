"""prefix_cache.py and pending_pages.py: one maker a page, waiters that are told, copies that inherit."""

import pytest
from pages_words import PROMPT, counts, finish, keys_of, new_cache, reserve, start

pytestmark = pytest.mark.host


def test_equal_prompts_at_one_instant_are_made_once():
    cache = new_cache()
    owner = start(cache, "owner")
    waiters = {name: start(cache, name) for name in "abc"}
    for waiter in waiters.values():
        assert (waiter.pages[:4], waiter.num_hits, waiter.num_awaited) == (owner.pages[:4], 0, 4)
    assert counts(cache, {"owner", *"abc"}) == (12, 0, 8)  # the prompt once, a tail each
    cache.publish("owner", keys_of(), owner.pages, 0, 3)
    assert all(cache.waiting(name) for name in "abc")
    cache.publish("owner", keys_of(), owner.pages, 3, 4)
    assert not any(cache.waiting(name) for name in ("owner", *"abc"))
    for reservation in (owner, *waiters.values()):
        cache.allocator.release(reservation.pages)
    assert counts(cache, set()) == (16, 4, 0)
    assert cache.stats.num_waits == 3


def test_a_longer_prompt_waits_for_its_beginning_and_owns_its_end():
    cache = new_cache()
    longer = (*PROMPT, 7, 7, 7, 7)
    short, long, third = start(cache, "short"), start(cache, "long", longer), start(cache, "third", longer)
    assert (long.num_awaited, third.num_awaited) == (4, 6)
    finish(cache, "short", short)
    assert not cache.waiting("long")
    assert cache.waiting("third")
    finish(cache, "long", long, longer)
    assert not cache.waiting("third")
    cache.allocator.release(third.pages)
    assert counts(cache, set()) == (14, 6, 0)


def test_an_owner_that_fails_sends_its_waiters_back_and_one_of_them_does_the_work():
    cache = new_cache()
    owner = start(cache, "owner")
    cache.publish("owner", keys_of(), owner.pages, 0, 1)
    waiters = {name: start(cache, name) for name in "ba"}
    assert cache.drop("owner") == ["b", "a"]
    cache.check({"b", "a"})
    assert cache.num_cached(keys_of()) == 1
    for reservation in (owner, *waiters.values()):
        cache.allocator.release(reservation.pages)
    assert counts(cache, set()) == (19, 1, 0)
    again = start(cache, "b")
    assert (again.num_hits, again.num_awaited) == (1, 0)
    assert start(cache, "a").num_awaited == 3


def test_those_who_waited_for_a_waiters_own_pages_go_back_too():
    cache = new_cache()
    longer = (*PROMPT, 7, 7, 7, 7)
    tables = [start(cache, "short"), start(cache, "long", longer), start(cache, "third", longer)]
    other = start(cache, "bystander", range(50, 59))
    assert cache.drop("short") == ["long", "third"]
    for reservation in tables:
        cache.allocator.release(reservation.pages)
    assert counts(cache, {"bystander"}) == (15, 0, 5)
    finish(cache, "bystander", other, range(50, 59))
    assert counts(cache, set()) == (16, 4, 0)


def test_a_waiter_that_goes_troubles_nobody_unless_they_wait_for_it():
    cache = new_cache()
    longer = (*PROMPT, 7, 7, 7, 7)
    owner, long, third = start(cache, "owner"), start(cache, "long", longer), start(cache, "third", longer)
    plain = start(cache, "plain")
    assert cache.drop("plain") == []
    cache.allocator.release(plain.pages)
    assert cache.drop("long") == ["third"]
    cache.allocator.release(long.pages)
    cache.allocator.release(third.pages)
    cache.check({"owner"})
    assert finish(cache, "owner", owner) == owner.pages[:4]
    assert counts(cache, set()) == (16, 4, 0)


def test_a_reservation_is_undone_by_drop_and_release():
    cache = new_cache()
    owner = start(cache, "owner")
    taken = reserve(cache, "b", keys_of(), 5)
    assert cache.waiting("b")
    assert cache.drop("b") == []
    cache.allocator.release(taken.pages)
    assert not cache.waiting("b")
    assert counts(cache, {"owner"}) == (15, 0, 5)
    assert not cache.has_waiters(owner.pages)


def test_registration_stops_at_a_key_that_somebody_took_in_between():
    cache = new_cache()
    keys = keys_of()
    slow, quick = reserve(cache, "slow", keys, 5), reserve(cache, "quick", keys[:2], 3)
    assert cache.pend("quick", keys[:2], quick.pages, 0) == 2
    assert cache.pend("slow", keys, slow.pages, 0) == 0
    assert cache.publish("slow", keys, slow.pages, 0, 4) == slow.pages[:4]
    assert cache.num_cached(keys) == 0
    cache.allocator.release(slow.pages)
    finish(cache, "quick", quick, PROMPT[:5])
    assert counts(cache, set()) == (18, 2, 0)


def test_nothing_is_registered_behind_a_page_whose_maker_has_gone():
    cache = new_cache()
    longer = (*PROMPT, 7, 7)
    owner = start(cache, "owner")
    waiter = reserve(cache, "waiter", keys_of(longer), 6)
    assert cache.drop("owner") == ["waiter"]
    assert cache.pend("waiter", keys_of(longer), waiter.pages, waiter.num_shared) == 0
    cache.allocator.release(waiter.pages)
    cache.allocator.release(owner.pages)
    assert counts(cache, set()) == (20, 0, 0)


def test_a_copy_in_flight_inherits_the_pages_that_others_wait_for():
    cache = new_cache()
    owner = start(cache, "owner")
    cache.publish("owner", keys_of(), owner.pages, 0, 1)
    near, far = start(cache, "near", PROMPT[:5]), start(cache, "far")
    assert cache.has_waiters(owner.pages)
    in_flight = owner.pages[:2]
    cache.allocator.retain(in_flight, "transfer")
    cache.hand_over("owner", "copy", in_flight)
    assert cache.drop("owner") == ["far"]
    cache.allocator.release(owner.pages)
    cache.allocator.release(far.pages)
    cache.check({"copy", "near"})
    assert cache.waiting("near")
    assert cache.publish("copy", keys_of(), in_flight, 1, 2) == in_flight[1:]
    cache.allocator.release(in_flight, "transfer")
    assert not cache.waiting("near")
    cache.allocator.release(near.pages)
    assert counts(cache, set()) == (18, 2, 0)


def test_a_copy_in_flight_that_fails_sends_the_waiters_back():
    cache = new_cache()
    owner, waiter = start(cache, "owner"), start(cache, "waiter")
    cache.hand_over("owner", "copy", owner.pages)
    assert cache.drop("owner") == []
    assert cache.drop("copy") == ["waiter"]
    cache.allocator.release(owner.pages)
    cache.allocator.release(waiter.pages)
    assert counts(cache, set()) == (20, 0, 0)


def test_a_waiter_inherits_nothing_that_it_waits_for():
    cache = new_cache()
    owner = start(cache, "owner")
    start(cache, "waiter")
    with pytest.raises(AssertionError, match="wait for itself"):
        cache.hand_over("owner", "waiter", owner.pages)
