"""page_allocator.py: references, states, eviction under pressure, and books that notice when they are wrong."""

import pytest

from pshare_jax.engine.kv.allocator import PageAllocator

pytestmark = pytest.mark.host


def pool(num_pages=7, **kwargs):
    """A pool with the least prefix cache there is: it forgets the page that is evicted."""
    allocator = PageAllocator(num_pages, **kwargs)
    allocator.attach(lambda page: allocator.forget([page]))
    return allocator


def take(allocator, num) -> list[int]:
    pages = allocator.allocate(num)
    assert pages is not None
    return pages


def counts(allocator):
    allocator.check()
    return allocator.num_free, allocator.num_cached, allocator.num_used


def keep_all(allocator, pages):
    for page in pages:
        allocator.keep(page)


def test_lends_every_page_but_the_padding_page_once():
    allocator = pool()
    assert sorted(take(allocator, 2) + take(allocator, 4)) == [1, 2, 3, 4, 5, 6]
    assert counts(allocator) == (0, 0, 6)


def test_a_pool_of_padding_alone_is_refused():
    with pytest.raises(ValueError, match="none to lend"):
        PageAllocator(1)


def test_allocates_all_or_nothing():
    allocator = pool()
    held = take(allocator, 3)
    keep_all(allocator, held)
    allocator.release(held[1:])
    assert counts(allocator) == (3, 2, 1)
    assert allocator.allocate(6) is None
    assert counts(allocator) == (3, 2, 1)
    assert allocator.num_evicted == 0
    assert len(take(allocator, 5)) == 5
    assert allocator.num_evicted == 2
    assert take(allocator, 0) == []


def test_a_page_is_free_after_its_last_holder():
    allocator = pool()
    pages = take(allocator, 2)
    allocator.retain(pages, "transfer")
    allocator.release(pages)
    assert counts(allocator) == (4, 0, 2)
    assert dict(allocator.holders) == {"transfer": 2}
    allocator.release(pages, "transfer")
    assert counts(allocator) == (6, 0, 0)
    assert not allocator.holders


def test_a_published_page_is_cached_after_its_last_holder_and_can_be_retained_again():
    allocator = pool()
    (page,) = take(allocator, 1)
    allocator.keep(page)
    allocator.release([page])
    assert counts(allocator) == (5, 1, 0)
    allocator.retain([page])
    assert counts(allocator) == (5, 0, 1)
    allocator.forget([page])
    assert counts(allocator) == (5, 0, 1)
    allocator.release([page])
    assert counts(allocator) == (6, 0, 0)


def test_evicts_the_longest_unused_first_and_ends_before_beginnings():
    freed = []
    allocator = pool(on_free=freed.extend)
    first, second = take(allocator, 3), take(allocator, 3)
    keep_all(allocator, first + second)
    allocator.release(first)
    allocator.release(second)
    allocator.retain(first[:1])
    allocator.release(first[:1])
    for _ in range(6):
        take(allocator, 1)
    assert freed == [first[2], first[1], *reversed(second), first[0]]


def test_free_pages_go_before_cached_ones_and_used_ones_never():
    allocator = pool()
    used, cached = take(allocator, 2), take(allocator, 2)
    keep_all(allocator, used + cached)
    allocator.release(cached)
    assert not set(take(allocator, 2)) & {*used, *cached}
    assert set(take(allocator, 2)) == set(cached)
    assert allocator.allocate(1) is None
    assert allocator.is_kept(used[0])


def test_reports_pages_when_their_content_has_gone_before_they_are_lent_again():
    events = []
    allocator = pool(3, on_free=lambda pages: events.append((sorted(pages), allocator.num_free)))
    pages = take(allocator, 2)
    allocator.keep(pages[0])
    allocator.retain(pages)
    allocator.release(pages)
    assert events == []
    allocator.release(pages)
    assert events == [([pages[1]], 1)]
    assert allocator.allocate(2) is not None
    assert events[1:] == [([pages[0]], 2)]


MISUSES = {
    "released twice": (lambda a, page: (a.retain([2]), a.release([page, page])), "nobody held it"),
    "released by another": (lambda a, page: a.release([page], "transfer"), "transfer released 1 references and held 0"),
    "a free page retained": (lambda a, page: a.retain([6]), "neither used nor cached"),
    "the padding page retained": (lambda a, page: a.retain([0]), "neither used nor cached"),
    "a negative page retained": (lambda a, page: a.retain([page - 7]), "neither used nor cached"),
    "a negative page released": (lambda a, page: a.release([page - 7]), "nobody held it"),
    "a free page published": (lambda a, page: a.keep(6), "nobody holds it"),
    "published twice": (lambda a, page: (a.keep(page), a.keep(page)), "published already"),
    "an unpublished page forgotten": (lambda a, page: a.forget([page]), "did not know it"),
    "fewer than none": (lambda a, page: a.allocate(-1), "-1 pages"),
    "two caches": (lambda a, page: a.attach(print), "already has a prefix cache"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_named(misuse):
    act, sentence = MISUSES[misuse]
    allocator = pool()
    first, _ = take(allocator, 2)
    with pytest.raises(AssertionError, match=sentence):
        act(allocator, first)


def test_eviction_without_a_prefix_cache_or_with_one_that_holds_on_is_named():
    for allocator, sentence in ((PageAllocator(2), "has no prefix cache"), (PageAllocator(2), "did not forget")):
        if "forget" in sentence:
            allocator.attach(lambda page: None)
        pages = take(allocator, 1)
        allocator.keep(pages[0])
        allocator.release(pages)
        with pytest.raises(AssertionError, match=sentence):
            take(allocator, 1)


FAULTS = {
    "lost": (lambda a: a._free.pop(), "lost"),
    "lent padding": (lambda a: a._free.append(0), "page 0 was lent"),
    "twice": (lambda a: a._free.append(a._free[0]), "twice"),
    "negative": (lambda a: a._counts.__setitem__(a._free[0], -1), "negative"),
    "free and used": (lambda a: a._free.append(1), "two states"),
    "cached and used": (lambda a: a._cached.update({1: None}), "two states"),
    "free but published": (lambda a: a._kept.__setitem__(a._free[0], 1), "still known"),
    "cached but unpublished": (lambda a: a._kept.__setitem__(2, 0), "unknown to the prefix cache"),
    "leaked": (lambda a: a._counts.__setitem__(1, 2), r"2 references are held, but the holders are {'sequence': 1}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault):
    spoil, sentence = FAULTS[fault]
    allocator = pool()
    take(allocator, 2)
    keep_all(allocator, [1, 2])
    allocator.release([2])
    allocator.check()
    spoil(allocator)
    with pytest.raises(AssertionError, match=sentence):
        allocator.check()


@pytest.mark.timeout(20)
def test_a_large_pool_needs_no_scan():
    # 10,000 evictions from 100,000 cached pages: with a scan each, minutes.
    allocator = pool(100_001)
    pages = take(allocator, 100_000)
    keep_all(allocator, pages)
    allocator.release(pages)
    for _ in range(10_000):
        take(allocator, 1)
    assert counts(allocator) == (0, 90_000, 10_000)
