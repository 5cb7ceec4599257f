"""page_manager.py, what the model-based test cannot say: collisions, orders, names of leaks, misuse, faults, large pools."""

import random
from collections.abc import Sequence

import pytest

from pshare_jax.engine.kv import keys as keys_module
from pshare_jax.engine.kv.keys import PageKey, page_keys
from pshare_jax.engine.kv.page_manager import PageManager, Reservation

pytestmark = pytest.mark.host
SIZE = 2
CONTEXT = range(8)  # four full pages
OTHER = range(20, 28)


def keys_of(context: Sequence[int] = CONTEXT, salt=""):
    return page_keys("base", salt, context, SIZE)


def take(manager, num) -> list[int]:
    pages = manager.allocate(num)
    assert pages is not None
    return pages


def start(manager, name, context: Sequence[int] = CONTEXT, salt="") -> Reservation:
    """Reserves a context, with a page more for its tail."""
    keys = keys_of(context, salt)
    reservation = manager.reserve(name, keys, len(keys) + 1)
    assert reservation is not None
    return reservation


def finish(manager, name, reservation, context: Sequence[int] = CONTEXT, salt=""):
    """Publishes what `start` reserved and releases all; returns the published table."""
    keys, first = keys_of(context, salt), reservation.num_shared
    table = reservation.pages[:first] + manager.publish(name, keys, reservation.pages, first, len(keys))
    manager.release(table + reservation.pages[len(keys) :])
    manager.check(())
    return table


def warm(manager, context: Sequence[int] = CONTEXT):
    return finish(manager, "warm", start(manager, "warm", context), context)


def evict(manager, num=1):
    """Evicts `num` pages."""
    manager.release(take(manager, manager.num_free + num))


# --- pages and holders ---------------------------------------------------------------------------------------------------


def test_every_page_but_the_padding_page_is_lent_once():
    manager = PageManager(7)
    assert sorted(take(manager, 2) + take(manager, 4)) == [1, 2, 3, 4, 5, 6]
    assert manager.allocate(1) is None
    with pytest.raises(ValueError, match="none to lend"):
        PageManager(1)


def test_references_are_counted_by_holder():
    manager = PageManager(7)
    pages = take(manager, 2)
    manager.retain(pages, "transfer")
    manager.release(pages)
    assert dict(manager.holders) == {"transfer": 2}
    assert manager.num_used == 2
    manager.release(pages, "transfer")
    assert not manager.holders
    assert manager.num_free == 6


def test_stats_of_four_equal_prompts_at_one_instant_and_of_a_duplicate():
    manager = PageManager(30)
    late = manager.reserve("late", [], 5)  # bypasses the lookup
    tables = {name: start(manager, name) for name in "abcd"}
    for name, reservation in tables.items():
        finish(manager, name, reservation)
    table = tables["a"].pages[:4]
    assert late is not None
    for pages in (late.pages, table):  # the second time changes nothing
        assert manager.publish("late", keys_of(), pages, 0, 4) == table
    stats = manager.stats
    assert (stats.num_published, stats.num_duplicates, stats.num_waits) == (4, 4, 3)


# --- before and instead of waiting ---------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_wait_computes_pending_pages_itself_and_takes_over_published_pages():
    manager = PageManager(30)
    slow = start(manager, "slow")
    manager.publish("slow", KEYS, slow.pages, 0, 1)
    quick = manager.reserve("quick", KEYS, 5, wait=False)
    assert quick is not None
    assert (quick.pages[0], quick.num_shared, manager.waiting("quick")) == (slow.pages[0], 1, False)
    assert manager.publish("quick", KEYS, quick.pages, 1, 2) == quick.pages[1:2]  # still pending elsewhere
    manager.publish("slow", KEYS, slow.pages, 1, 4)
    assert manager.publish("quick", KEYS, quick.pages, 1, 4) == slow.pages[1:4]
    assert (manager.num_hits(KEYS), manager.stats.num_waits) == (4, 0)
    manager.check({"slow", "quick"})


def test_could_reserve_counts_what_would_be_shared_and_changes_nothing():
    manager = PageManager(8)
    warm(manager, CONTEXT[:4])
    warm(manager, OTHER[:6])  # 2 pages are free, 5 can be evicted
    for num_pages, spare, fits in ((7, 0, True), (8, 0, False), (6, 1, True), (6, 2, False)):
        assert manager.could_reserve(KEYS, num_pages, spare) == fits
        assert manager.could_reserve(keys_of(range(40, 48)), num_pages, spare) == fits
    reservation = start(manager, "producer")
    assert (manager.num_free, manager.num_available, manager.num_evicted) == (0, 2, 1)
    for num_pages, wait, fits in ((6, True, True), (7, True, False), (4, False, True), (5, False, False)):
        assert manager.could_reserve(KEYS, num_pages, wait=wait) == fits
    assert (manager.num_free, manager.num_available, manager.num_evicted) == (0, 2, 1)
    manager.check({"producer"})
    finish(manager, "producer", reservation)


def test_waiters_of_a_producer_are_those_that_wait_for_its_own_pages():
    manager = PageManager(60)
    contexts = {"a": CONTEXT[:4], "b": CONTEXT, "c": CONTEXT[:2], "d": (*CONTEXT, 7, 7)}
    for name, context in contexts.items():
        start(manager, name, context)
    assert [manager.waiters_of(name) for name in "abcd"] == [["b", "c", "d"], ["d"], [], []]
    manager.drop("a")
    assert manager.waiters_of("a") == manager.waiters_of("stranger") == []


class Lookups(dict):
    """Counts them."""

    num = 0

    def get(self, *args):
        self.num += 1
        return super().get(*args)


def test_a_long_prompt_is_found_by_bisection():
    manager = PageManager(2_001)
    context = range(2 * 1_024)
    warm(manager, context[: 2 * 700])
    keys = keys_of(context)
    tree = manager._tree = Lookups(manager._tree)
    start(manager, "producer", context[: 2 * 900])
    tree.num = 0
    assert (manager.num_hits(keys), manager.num_shareable(keys)) == (700, 900)
    assert manager.could_reserve(keys, 1_001)
    assert not manager.could_reserve(keys, 2_001)
    assert tree.num < 4 * 14


# --- orders --------------------------------------------------------------------------------------------------------------


def test_the_longest_unused_prompt_is_evicted_first_its_end_before_its_beginning():
    manager = PageManager(9)
    for context in (CONTEXT, OTHER[:6], CONTEXT[:4]):  # the last hit makes the first prompt's beginning young again
        warm(manager, context)
    left = []
    while manager.num_cached:
        evict(manager)
        left.append((manager.num_hits(keys_of()), manager.num_hits(keys_of(OTHER))))
    assert left == [(3, 3), (2, 3), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]


def test_waiters_are_dropped_in_the_order_of_their_arrival_and_what_waits_for_them_last():
    manager = PageManager(60)
    warm(manager, CONTEXT[:2])
    evict(manager)
    longer = (*CONTEXT, 7, 7, 7, 7)
    contexts = {"producer": CONTEXT, "d": CONTEXT, "long": longer, "third": (*longer, 8, 8), "b": CONTEXT[:4]}
    tables = [start(manager, name, context) for name, context in contexts.items()]
    bystander = start(manager, "bystander", OTHER)
    assert manager.drop("producer") == ["d", "long", "third", "b"]
    for reservation in tables:
        manager.release(reservation.pages)
    manager.check({"bystander"})
    finish(manager, "bystander", bystander, OTHER)
    assert (manager.num_used, manager.num_cached) == (0, 4)


def test_a_pending_page_whose_beginning_was_evicted_is_finished_privately():
    manager = PageManager(21)
    warm(manager, CONTEXT[:4])
    producer, waiter = start(manager, "producer"), start(manager, "waiter")
    for reservation in (producer, waiter):  # against the rule: both release the beginning
        manager.release(reservation.pages[:2])
    evict(manager, 2)
    manager.check({"producer", "waiter"})
    assert manager.waiting("waiter")
    assert manager.publish("producer", keys_of(), producer.pages, 2, 4) == producer.pages[2:4]
    assert not manager.waiting("waiter")
    for reservation in (producer, waiter):
        manager.release(reservation.pages[2:])
    manager.check(())
    assert manager.num_free == 20


# --- collisions ----------------------------------------------------------------------------------------------------------


def test_with_eight_bit_digests_every_hit_still_has_the_right_tokens(monkeypatch):
    strong = keys_module._digest
    monkeypatch.setattr(keys_module, "_digest", lambda data: strong(data)[:1])
    draw = random.Random(0)
    manager = PageManager(200)
    content, hits, collisions = {}, 0, 0
    for _ in range(2000):
        context, salt = tuple(draw.choices(range(3), k=draw.randrange(11))), draw.choice(["", "s"])
        keys = keys_of(context, salt)
        made = [(salt, context[: SIZE * (index + 1)]) for index in range(len(keys))]
        reservation = start(manager, "a", context, salt)
        shared = reservation.num_shared
        assert [content[page] for page in reservation.pages[:shared]] == made[:shared]
        content.update(zip(reservation.pages[shared:], made[shared:], strict=False))
        table = finish(manager, "a", reservation, context, salt)
        assert [content[page] for page in table] == made
        hits += shared
        collisions += manager.num_hits(keys) < len(keys)
    assert manager.num_used == 0
    assert hits > 1000
    assert collisions > 100


def test_a_page_is_not_believed_behind_another_first_page_of_the_same_digest(monkeypatch):
    # Both prompts have the same digests throughout, the second pages also the same content.
    monkeypatch.setattr(keys_module, "_digest", lambda data: bytes([len(data) % 251]))
    manager = PageManager(21)
    one, other = (1, 1, 5, 5), (2, 2, 5, 5)
    assert keys_of(one)[1] == keys_of(other)[1]
    table = warm(manager, one)
    assert manager.num_hits(keys_of(other)) == 0
    manager.retain(table[1:])  # against the rule: the second page alone outlives the first
    evict(manager)
    warm(manager, other[:2])
    assert manager.num_hits(keys_of(other)) == 1
    manager.release(table[1:])
    manager.check(())
    assert (manager.num_free, manager.num_cached) == (19, 1)


@pytest.mark.parametrize(("published", "asked"), [("ab", "b"), ("b", "ab"), ("ab", "cb"), ("abc", "aac")])
def test_the_same_page_elsewhere_in_a_prompt_is_no_hit(published, asked):
    manager = PageManager(9)
    keys = {name: PageKey(name.encode(), name.encode()) for name in "abc"}
    reservation = manager.reserve("a", [keys[name] for name in published], 3)
    assert reservation is not None
    assert manager.num_shareable([keys[name] for name in asked]) == (asked == "aac")


# --- misuse and faults ---------------------------------------------------------------------------------------------------

# Pages 1 and 2 are published and held; "producer" has 3 and 4 pending, for which "waiter" waits; 5 and 6 are their tails.
KEYS = keys_of()
MISUSES = {
    "released twice": (lambda m: m.release([5, 5]), "page 5 was released by sequence, but it has no reference"),
    "released by another": (lambda m: m.release([5], "transfer"), "transfer released 1 references and held 0"),
    "a free page retained": (lambda m: m.retain([7]), "page 7 was retained by sequence, but it is free"),
    "the padding page retained": (lambda m: m.retain([0]), "page 0 .* free"),
    "a negative page retained": (lambda m: m.retain([-4]), "page -4 .* free"),
    "a negative page released": (lambda m: m.release([-4]), "page -4 .* no reference"),
    "a pending page released": (lambda m: (m.release([3]), m.release([3])), "page 3 .* pending"),
    "fewer than none": (lambda m: m.allocate(-1), "-1 pages"),
    "awaited by its producer": (lambda m: m.reserve("producer", KEYS, 5), "page 3 would be awaited by its producer"),
    "adopted by its waiter": (lambda m: m.adopt("waiter", "producer", [3]), "page 3 would be adopted by a waiter"),
    "published by a waiter": (lambda m: m.publish("waiter", KEYS, [1, 2, 3, 4], 2, 3), "another than its producer"),
    "published too early": (lambda m: m.publish("producer", KEYS, [1, 2, 3, 4], 3, 4), "before the page before it"),
    "another prompt's page": (lambda m: m.publish("p", keys_of(OTHER), [1], 0, 1), "in the tree under another key"),
    "another page before it": (lambda m: m.publish("p", keys_of(OTHER), [1, 5], 1, 2), "not the page of this prompt"),
}


def busy_manager():
    manager = PageManager(10)
    producer = start(manager, "producer")
    manager.publish("producer", KEYS, producer.pages, 0, 2)
    waiter = start(manager, "waiter")
    assert (producer.pages, waiter.pages) == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6])
    manager.check({"producer", "waiter"})
    return manager


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_named(misuse):
    act, sentence = MISUSES[misuse]
    manager = busy_manager()
    with pytest.raises(AssertionError, match=sentence):
        act(manager)


def test_pages_that_another_produces_are_not_adopted():
    manager = busy_manager()
    manager.adopt("transfer", "waiter", [1, 2, 3, 4])
    manager.check({"producer", "waiter"})


def test_a_page_without_a_key_is_never_published():
    with pytest.raises(IndexError):
        busy_manager().publish("producer", KEYS, [1, 2, 3, 4, 5], 4, 5)


def put(manager, page, **fields):
    """Changes fields of a page's record."""
    for name, value in fields.items():
        setattr(manager._pages[page], name, value)


FAULTS = {
    "lost": (lambda m: m._free.pop(), "free list"),
    "free twice": (lambda m: m._free.append(7), "free list"),
    "padding lent": (lambda m: put(m, 0, refs=1), "page 0 is for padding, but in use"),
    "padding free": (lambda m: m._free.append(0), "free list"),
    "negative": (lambda m: put(m, 7, refs=-1), "page 7 has a negative reference count"),
    "leaked": (lambda m: put(m, 5, refs=2), "11 references are held, but the holders are {'sequence': 10}"),
    "evictable and used": (lambda m: m._evictable.add(1, 0), "unreferenced pages with a key"),
    "pending, not held": (lambda m: put(m, 3, refs=0), "page 3 is pending without a reference"),
    "awaited, not pending": (lambda m: put(m, 3, producer=None), "page 3 is awaited without a producer"),
    "published ahead": (lambda m: put(m, 4, producer=None, waiters={}), "page 4 is published before its parent"),
    "used more": (lambda m: put(m, 2, uses=2), "page 2 has more uses than its parent"),
    "no key": (lambda m: put(m, 2, key=None), "page 2 has relatives without a key"),
    "another parent": (lambda m: put(m, 4, parent=m._pages[2]), "page 3 has a child with another parent"),
    "no child": (lambda m: m._pages[1].children.clear(), "page 2 is no child of its parent"),
    "not in the tree": (lambda m: m._tree.pop(KEYS[3].digest), "the tree is not exactly the pages with a key"),
    "under another key": (lambda m: put(m, 4, key=PageKey(b"x", b"")), "the tree is not exactly"),
    "producers": (lambda m: m._produced["producer"].popitem(), "index of their producers"),
    "waiters": (lambda m: m._awaited.clear(), "index of their waiters"),
    "an empty index": (lambda m: m._awaited.update(w={}), "index of their waiters"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault):
    spoil, sentence = FAULTS[fault]
    manager = busy_manager()
    spoil(manager)
    with pytest.raises(AssertionError, match=sentence):
        manager.check({"producer", "waiter"})


@pytest.mark.parametrize(
    ("live", "sentence"), [("waiter", "producers .*'producer'"), ("producer", "waiters .*'waiter'")]
)
def test_check_names_producers_and_waiters_that_are_gone(live, sentence):
    with pytest.raises(AssertionError, match=sentence):
        busy_manager().check({live})


# --- large pools ---------------------------------------------------------------------------------------------------------


def test_a_very_long_chain_leaves_at_once_without_recursion():
    manager = PageManager(3_001)
    table = warm(manager, range(2 * 3_000 - 2))
    manager.retain(table[1:])
    manager.release(table[1:])  # now the beginning is the longest unused
    evict(manager)
    assert manager.num_free == 3_000
    manager.check(())


@pytest.mark.timeout(60)
def test_a_large_pool_needs_no_scan():
    # 10,000 evictions from 20,000 published pages: with a scan each, minutes.
    manager = PageManager(20_001)
    keys = [PageKey(index.to_bytes(4), b"") for index in range(20_000)]
    reservation = manager.reserve("a", keys, 20_000)
    assert reservation is not None
    manager.release(manager.publish("a", keys, reservation.pages, 0, 20_000))
    for _ in range(10_000):
        take(manager, 1)
    manager.check(())
    assert (manager.num_used, manager.num_cached) == (10_000, 10_000)
