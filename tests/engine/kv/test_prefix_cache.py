"""prefix_cache.py: right hits only, eviction that leaves nothing out of reach, books that notice."""

import random

import pytest
from pages_words import PROMPT, SIZE, counts, finish, keys_of, new_cache, reserve, start, warm

from pshare_jax.engine.kv import keys as keys_module
from pshare_jax.engine.kv.allocator import PageAllocator
from pshare_jax.engine.kv.prefix_cache import CacheStats, PrefixCache, Reservation

pytestmark = pytest.mark.host

# Hits


def test_a_hit_returns_the_published_pages_held():
    cache = new_cache()
    table = warm(cache)
    assert counts(cache) == (16, 4, 0)
    again = reserve(cache, "b", keys_of(), 5)
    assert again == Reservation([*table, again.pages[4]], num_hits=4, num_awaited=0)
    assert again.num_shared == 4
    assert counts(cache) == (15, 0, 5)


@pytest.mark.parametrize("shared", range(len(PROMPT) + 1))
def test_a_hit_ends_with_the_last_full_page_in_common(shared):
    cache = new_cache()
    table = warm(cache)
    other = PROMPT[:shared] + tuple(99 for _ in PROMPT[shared:])
    assert reserve(cache, "b", keys_of(other), 5).pages[: shared // SIZE] == table[: shared // SIZE]
    assert cache.num_cached(keys_of(other)) == shared // SIZE


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9])
def test_a_warm_prompt_always_leaves_its_last_token(length):
    cache = new_cache()
    keys = keys_of(PROMPT[:length])
    for _ in range(3):
        reservation = start(cache, "a", PROMPT[:length])
        assert reservation.num_hits * SIZE <= length - 1
        finish(cache, "a", reservation, PROMPT[:length])
    assert cache.num_cached(keys) == (length - 1) // SIZE


def test_same_salt_and_weights_hit_and_others_miss():
    cache = new_cache()
    warm(cache, salt="mine")
    assert cache.num_cached(keys_of(salt="mine")) == 4
    assert cache.num_cached(keys_of(salt="yours")) == 0
    assert cache.num_cached(keys_of(salt="")) == 0
    assert cache.num_cached(keys_of(salt="mine", fingerprint="other base")) == 0


def test_no_keys_no_lookup_and_the_pages_may_still_be_published():
    cache = new_cache()
    reservation = reserve(cache, "scored", [], 5)
    assert (reservation.num_shared, len(reservation.pages)) == (0, 5)
    assert cache.publish("scored", keys_of(), reservation.pages, 0, 4) == reservation.pages[:4]
    cache.allocator.release(reservation.pages)
    assert counts(cache) == (16, 4, 0)


def test_stats_count_what_the_caller_counts():
    stats = CacheStats()
    cache = PrefixCache(PageAllocator(21), stats)
    warm(cache)
    warm(cache)
    assert (stats.num_requests, stats.prompt_tokens, stats.cached_tokens) == (0, 0, 0)
    stats.count(9, 0)
    stats.count(9, 8)
    assert (stats.num_requests, stats.prompt_tokens, stats.cached_tokens) == (2, 18, 8)
    assert (stats.num_published, stats.num_duplicates, stats.num_waits) == (4, 0, 0)


def test_a_reservation_that_does_not_fit_holds_and_evicts_nothing():
    cache = new_cache(7)
    warm(cache)
    assert cache.reserve("b", keys_of(), 7) is None
    assert counts(cache) == (2, 4, 0)
    assert cache.num_cached(keys_of()) == 4
    assert len(reserve(cache, "b", keys_of(), 6).pages) == 6


# Collisions


@pytest.fixture
def weak_digest(monkeypatch):
    strong = keys_module._digest
    monkeypatch.setattr(keys_module, "_digest", lambda data: strong(data)[:1])


def test_with_eight_bit_digests_every_hit_still_has_the_right_tokens(weak_digest):
    draw = random.Random(0)
    cache = new_cache(200)
    content, hits, collisions = {}, 0, 0
    for _ in range(2000):
        prompt = tuple(draw.choices(range(3), k=draw.randrange(1, 12)))
        salt = draw.choice(["", "s"])
        keys = keys_of(prompt, salt=salt)
        made = [(salt, prompt[: SIZE * (index + 1)]) for index in range(len(keys))]
        reservation = start(cache, "a", prompt, salt=salt)
        shared = reservation.num_shared
        assert [content[page] for page in reservation.pages[:shared]] == made[:shared]
        content.update(zip(reservation.pages[shared:], made[shared:], strict=False))
        table = finish(cache, "a", reservation, prompt, salt=salt)
        assert [content[page] for page in table] == made
        hits += shared
        collisions += cache.num_cached(keys) < len(keys)
    assert counts(cache)[2] == 0
    assert hits > 1000
    assert collisions > 100


def test_a_page_is_not_believed_behind_another_first_page_of_the_same_digest(monkeypatch):
    # Both prompts have the same digests throughout, the second pages also the same content.
    monkeypatch.setattr(keys_module, "_digest", lambda data: bytes([len(data) % 251]))
    cache = new_cache()
    one, other = (1, 1, 5, 5, 0), (2, 2, 5, 5, 0)
    assert keys_of(one)[1] == keys_of(other)[1]
    table = warm(cache, one)
    assert cache.num_cached(keys_of(other)) == 0
    cache.allocator.retain(table[1:])  # against the rule: the second page alone outlives the first
    while cache.num_cached(keys_of(one)):
        cache.allocator.evict(1)
    warm(cache, other[:3])
    assert cache.num_cached(keys_of(other)) == 1
    cache.allocator.release(table[1:])
    assert counts(cache) == (19, 1, 0)


# Publishing


def test_a_page_that_is_already_published_is_dropped_for_the_published_one():
    cache = new_cache()
    late = reserve(cache, "late", [], 5)  # bypasses the lookup
    table = warm(cache)
    assert cache.publish("late", keys_of(), late.pages, 0, 4) == table
    assert cache.stats.num_duplicates == 4
    assert counts(cache) == (15, 0, 5)
    cache.allocator.release([*table, late.pages[4]])
    assert counts(cache) == (16, 4, 0)


def test_publishing_twice_changes_nothing():
    cache = new_cache()
    reservation = start(cache, "a")
    for _ in range(2):
        assert cache.publish("a", keys_of(), reservation.pages, 0, 3) == reservation.pages[:3]
    assert cache.stats.num_published == 3
    cache.check({"a"})


def test_pages_pending_elsewhere_stay_private_to_who_bypassed_them():
    cache = new_cache()
    owner = start(cache, "owner")
    other = reserve(cache, "other", [], 5)
    assert cache.publish("other", keys_of(), other.pages, 0, 4) == other.pages[:4]
    assert cache.num_cached(keys_of()) == 0
    cache.allocator.release(other.pages)
    assert finish(cache, "owner", owner) == owner.pages[:4]
    assert counts(cache) == (16, 4, 0)


def test_chunks_are_published_in_order_and_each_is_a_hit_at_once():
    cache = new_cache()
    reservation = start(cache, "a")
    with pytest.raises(AssertionError, match="before the page before it"):
        cache.publish("a", keys_of(), reservation.pages, 1, 4)
    for first, last in ((0, 1), (1, 3), (3, 4)):
        cache.publish("a", keys_of(), reservation.pages, first, last)
        assert cache.num_cached(keys_of()) == last
        cache.check({"a"})


def test_only_the_owner_publishes_a_pending_page():
    cache = new_cache()
    start(cache, "owner")
    waiter = start(cache, "waiter")
    with pytest.raises(AssertionError, match="another than its owner"):
        cache.publish("waiter", keys_of(), waiter.pages, 0, 4)


def test_a_published_page_cannot_be_published_as_another():
    cache = new_cache()
    table = warm(cache)
    cache.allocator.retain(table)
    with pytest.raises(AssertionError, match="in the tree under another key"):
        cache.publish("a", keys_of(range(20, 29)), table, 0, 1)


def test_pages_of_another_prompt_are_noticed():
    cache = new_cache()
    reservation = start(cache, "a")
    cache.publish("a", keys_of(), reservation.pages, 0, 4)
    with pytest.raises(AssertionError, match="not the page of this prompt before"):
        cache.publish("a", keys_of(range(20, 29)), reservation.pages, 1, 2)


def test_tail_and_generated_pages_are_never_published():
    cache = new_cache()
    reservation = start(cache, "a")
    with pytest.raises(IndexError):
        cache.publish("a", keys_of(), reservation.pages, 0, 5)


# Eviction


def test_the_longest_unused_prompt_goes_first_its_end_before_its_beginning():
    cache = new_cache(9)
    old, new = PROMPT, tuple(range(20, 27))
    warm(cache, old)
    warm(cache, new)
    expected = [(3, 3), (2, 3), (1, 3), (0, 3), (0, 2), (0, 1), (0, 0)]
    assert cache.allocator.num_free == 1
    for left in expected:
        cache.allocator.evict(1)
        assert (cache.num_cached(keys_of(old)), cache.num_cached(keys_of(new))) == left
        cache.check()


def test_a_hit_makes_a_prompt_young_again():
    cache = new_cache(9)
    warm(cache, PROMPT)
    warm(cache, range(20, 27))
    warm(cache, PROMPT)
    cache.allocator.evict(3)
    assert (cache.num_cached(keys_of()), cache.num_cached(keys_of(range(20, 27)))) == (4, 0)


def test_pages_in_use_and_pages_of_a_pending_copy_are_never_evicted():
    cache = new_cache(10)
    table = warm(cache)
    cache.allocator.retain(table, "transfer")
    assert cache.reserve("b", keys_of(range(20, 29)), 6) is None
    assert cache.flush() == 0
    held = reserve(cache, "b", keys_of(range(20, 29)), 5)
    assert not set(held.pages) & set(table)
    cache.allocator.release(table, "transfer")
    assert counts(cache) == (0, 4, 5)


def test_an_evicted_beginning_takes_along_what_no_hit_can_reach():
    freed = []
    cache = PrefixCache(PageAllocator(21, on_free=freed.extend))
    table = warm(cache)
    cache.allocator.retain(table[2:3])  # against the rule: a page held without those before it
    cache.allocator.retain(table[3:4], "transfer")
    cache.allocator.release(table[3:4], "transfer")  # now the end is younger than the beginning
    freed.clear()
    assert cache.allocator.evict(1) == 2
    assert sorted(freed) == sorted([table[1], table[3]])
    assert counts(cache) == (18, 1, 1)
    assert not cache.allocator.is_kept(table[2])
    cache.allocator.release(table[2:3])
    assert counts(cache) == (19, 1, 0)


def test_a_pending_page_whose_beginning_was_evicted_is_finished_privately():
    cache = new_cache()
    table = warm(cache, PROMPT[:5])
    owner, waiter = start(cache, "owner"), start(cache, "waiter")
    for reservation in (owner, waiter):  # against the rule: both let go of the beginning
        cache.allocator.release(reservation.pages[:2])
    cache.allocator.evict(2)
    cache.check({"owner", "waiter"})
    assert cache.waiting("waiter")
    assert cache.publish("owner", keys_of(), owner.pages, 2, 4) == owner.pages[2:4]
    assert not cache.waiting("waiter")
    assert cache.num_cached(keys_of()) == 0
    cache.allocator.release(owner.pages[2:])
    cache.allocator.release(waiter.pages[2:])
    assert counts(cache, set()) == (20, 0, 0)
    assert len(table) == 2


def test_flush_frees_what_nobody_holds():
    cache = new_cache()
    warm(cache)
    warm(cache, range(20, 29))
    held = reserve(cache, "b", keys_of(), 4)
    assert cache.flush() == 4
    assert counts(cache) == (16, 0, 4)
    assert (cache.num_cached(keys_of()), cache.num_cached(keys_of(range(20, 29)))) == (4, 0)
    cache.allocator.release(held.pages)
    assert cache.flush() == 4
    assert counts(cache) == (20, 0, 0)


def test_a_very_long_chain_goes_at_once_without_recursion():
    cache = new_cache(3_001)
    prompt = range(2 * 3_000)
    table = warm(cache, prompt)
    cache.allocator.retain(table[1:])
    cache.allocator.release(table[1:])
    assert cache.allocator.evict(1) == len(table)
    assert counts(cache) == (3_000, 0, 0)


# Books that notice


def entry(cache, index):
    return cache._entries[keys_of()[index].digest]


FAULTS = {
    "owner gone": (lambda c: c._pending.add("ghost", 7), "'ghost' has gone"),
    "waiter gone": (lambda c: c._pending.wait("ghost", 5), "'ghost' has gone"),
    "pending but unowned": (lambda c: c._pending._owned.clear(), "their owners disagree"),
    "waiters one-sided": (lambda c: c._pending._waiters.clear(), "their waiters disagree"),
    "awaited but not pending": (
        lambda c: c._pending._remove(5) and c._pending._waiters.update({5: {"w": None}}),
        "nobody",
    ),
    "pending but not held": (lambda c: c._pending.add("owner", 20), "nobody holds a pending page"),
    "unknown to the allocator": (lambda c: c.allocator._kept.__setitem__(1, 0), "keeps other pages"),
    "one map only": (lambda c: c._entries.pop(keys_of()[0].digest), "by key and by page differ"),
    "out of reach": (lambda c: setattr(entry(c, 1), "parent", "gone"), "out of reach"),
    "no child": (lambda c: entry(c, 0).children.clear(), "is no child"),
    "child gone": (lambda c: entry(c, 0).children.add("gone"), "a child that has gone"),
    "wrong key": (
        lambda c: c._entries.update({b"x": c._entries.pop(keys_of()[0].digest)}),
        "under another key or page",
    ),
    "wrong page": (lambda c: c._by_page.update({1: c._by_page[2], 2: c._by_page[1]}), "under another key or page"),
    "published and pending": (lambda c: c._pending.add("owner", 1), "keeps other pages"),
    "ahead": (lambda c: (c._pending.done("owner", 4), c.allocator.keep(4)), "page 4 is published and the page before"),
    "allocator": (lambda c: c.allocator._free.pop(), "lost"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault):
    spoil, sentence = FAULTS[fault]
    cache = new_cache()
    owner = start(cache, "owner")
    assert owner.pages == [1, 2, 3, 4, 5]
    cache.publish("owner", keys_of(), owner.pages, 0, 2)
    cache._pending.add("owner", 5)
    cache._pending.wait("w", 5)
    cache.check({"owner", "w"})
    spoil(cache)
    with pytest.raises(AssertionError, match=sentence):
        cache.check({"owner", "w"})
