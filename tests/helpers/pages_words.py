"""Short words for the tests of the prefix cache: one prompt of four full pages, started, finished, counted."""

from pshare_jax.engine.kv.allocator import PageAllocator
from pshare_jax.engine.kv.keys import page_keys
from pshare_jax.engine.kv.prefix_cache import PrefixCache, Reservation
from pshare_jax.share.boundary import base_len

SIZE = 2
PROMPT = tuple(range(9))  # four full pages and the last prompt token


def keys_of(prompt=PROMPT, salt="", fingerprint="base"):
    return page_keys(fingerprint, salt, prompt[: base_len(len(prompt))], SIZE)


def new_cache(num_pages=21):
    return PrefixCache(PageAllocator(num_pages))


def counts(cache, live=None):
    cache.check(live)
    return cache.allocator.num_free, cache.allocator.num_cached, cache.allocator.num_used


def reserve(cache, owner, keys, num_pages) -> Reservation:
    reservation = cache.reserve(owner, keys, num_pages)
    assert reservation is not None
    return reservation


def start(cache, owner, prompt=PROMPT, **names) -> Reservation:
    """Reserves and registers a prompt, with one page more for its tail."""
    keys = keys_of(prompt, **names)
    reservation = reserve(cache, owner, keys, len(keys) + 1)
    cache.pend(owner, keys, reservation.pages, reservation.num_shared)
    return reservation


def finish(cache, owner, reservation, prompt=PROMPT, **names):
    """Publishes what `start` registered and releases all; returns the table as it was published."""
    keys, first = keys_of(prompt, **names), reservation.num_shared
    table = reservation.pages[:first] + cache.publish(owner, keys, reservation.pages, first, len(keys))
    cache.allocator.release(table + reservation.pages[len(keys) :])
    return table


def warm(cache, prompt=PROMPT, **names):
    return finish(cache, "warm", start(cache, "warm", prompt, **names), prompt, **names)
