"""Faults and counters for real engines: copies that come late or never, pools with fewer pages than their arrays, steps in
random order, what the transfers carried. Used by the stress, transfer and recompile tests.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny import tiny_module
from tiny_engine import Answer, Engines, settle

from pshare_jax.engine.config import Placement
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.sequence import PageTransfer
from pshare_jax.engine.sequence import Sequence as Running

NEVER = 10**9
"""So many polls that content does not come within a test."""


def task_sources(base: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The base and three tasks: itself, full weights, LoRA."""
    full, lora = tiny_module(base, folder / "math"), tiny_module(base, folder / "lora", kind="lora")
    return base, {"chat": "base", "math": full, "lora": lora}


def world_on(sources: tuple[Path, dict[str, Any]], placement: Placement, **plan: Any) -> Engines:
    """The sources' engine, by default with pages of 4, chunks of 32 and 4 rows."""
    base, tasks = sources
    return Engines(base, tasks, placement, **{"chunk": 32, **plan})


class Late:
    """Content that is there after so many more polls, whatever the device does, so that a run can be repeated.

    A test may change `polls`, or set `error`.
    """

    def __init__(self, content: Any, polls: int):
        self.content, self.polls = content, polls
        self.error: Exception | None = None

    def is_ready(self) -> bool:
        self.polls -= 1
        if self.polls < 0:
            self.content.block_until_ready()
        return self.polls < 0

    def block_until_ready(self) -> None:
        if self.error is not None:
            raise self.error
        self.content.block_until_ready()


class FaultyStore:
    """A pool's arrays, of which `num_pages` are lent and into which copies come after `polls()` polls.

    `late` are the copies' contents in the order in which they were sent, `fault` is raised by the next step over the pool.
    """

    def __init__(self, inner: Any, num_pages: int, polls: Callable[[], int]):
        self.inner, self.num_pages, self.polls = inner, num_pages, polls
        self.page_size, self.move_buckets = inner.page_size, inner.move_buckets
        self.late: list[Late] = []
        self.fault: Exception | None = None
        self.place_fault: Exception | None = None

    def run(self, step: Any, params: Any, tokens: Any, rows: Any) -> Any:
        raised, self.fault = self.fault, None
        if raised is not None:
            # It has taken the arrays, and gives none back.
            step(params, tokens, rows, self.inner.pages)
            raise raised
        return self.inner.run(step, params, tokens, rows)

    def empty_tables(self, num_slots: int, table_len: int) -> Any:
        return self.inner.empty_tables(num_slots, table_len)

    def put_table(self, tables: Any, slot: int, pages: Sequence[int]) -> Any:
        return self.inner.put_table(tables, slot, pages)

    def gather(self, ids: Sequence[int]) -> Any:
        return self.inner.gather(ids)

    def device_put(self, content: Any) -> Any:
        placed = self.inner.device_put(content)
        if isinstance(content, np.ndarray):
            return placed
        raised, self.place_fault = self.place_fault, None
        if raised is not None:
            raise raised
        self.late.append(Late(placed, self.polls()))
        return self.late[-1]

    def scatter(self, ids: Sequence[int], content: Any) -> None:
        self.inner.scatter(ids, content.content if isinstance(content, Late) else content)

    def fill(self, ids: Sequence[int]) -> None:
        self.inner.fill(ids)

    def reset(self) -> None:
        self.inner.reset()


def faulty_engine(
    world: Engines,
    *,
    prefill_pages: int | None = None,
    decode_pages: int | None = None,
    polls: Callable[[], int] = lambda: 0,
) -> Engine:
    """A cold engine over `FaultyStore`s. Pages to lend are counted without the one for padding.

    Its arrays keep the size that the world says, so that small pools need no programs of their own.
    """
    built = world.new_engine()
    pools: dict[int, Pool] = {}

    def changed(spec: Any, usable: int | None) -> Any:
        old = spec.pool
        if id(old) not in pools:
            store = FaultyStore(old.store, old.num_pages if usable is None else usable + 1, polls)
            pools[id(old)] = Pool(old.name, store, world.config.debug)
        return dataclasses.replace(spec, pool=pools[id(old)])

    prefill = [changed(spec, prefill_pages) for spec in built.prefill_specs]
    decode = [changed(spec, decode_pages) for spec in built.decode_specs]
    return Engine(prefill, decode, built.facts, built.config)


def stall_after(engine: Engine, seconds: float) -> None:
    """Requests without progress for so long are given up from now on."""
    limits = dataclasses.replace(engine.config.limits, stall_seconds=seconds)
    engine.config = dataclasses.replace(engine.config, limits=limits)


def store_of(pool: Pool) -> FaultyStore:
    """The pool's store in an engine of `faulty_engine`."""
    assert isinstance(pool.store, FaultyStore)
    return pool.store


def arrays_of(pool: Pool) -> list[jax.Array]:
    """The pool's device arrays."""
    store = pool.store.inner if isinstance(pool.store, FaultyStore) else pool.store
    assert isinstance(store, DevicePages)
    return jax.tree.leaves(store.pages)


def shardings(engine: Engine) -> list[list[Any]]:
    """Of every array of every pool."""
    return [[part.sharding for part in arrays_of(pool)] for pool in pools_of(engine)]


def decode_pages(answer: Answer) -> list[int]:
    """The ids of a running request's pages in its decode pool."""
    held = answer.sequence.decode.table
    assert held is not None
    return held.pages


def pools_of(engine: Engine) -> list[Pool]:
    """Every pool of the engine once."""
    admission = engine.admission
    return list({id(pool): pool for pool in (*admission.prefill_pools, *admission.decode_pools)}.values())


def assert_restored(engine: Engine) -> None:
    """An idle engine holds no page: all are free or cached, and nothing is pending."""
    settle(engine)
    for pool in pools_of(engine):
        manager = pool.manager
        assert manager.num_used == 0
        assert manager.num_free + manager.num_cached == pool.num_usable
        assert not manager.holders


def step_until(engine: Engine, condition: Callable[[], bool], steps: int = 2000) -> None:
    """Steps the engine until something is so."""
    for _ in range(steps):
        if condition():
            return
        engine.step()
    raise AssertionError("it did not become so")


def random_turn(engine: Engine, draw: np.random.Generator) -> None:
    """Steps most of the workers, in random order."""
    workers = [*engine.prefill_workers, *engine.decode_workers]
    for index in draw.permutation(len(workers)):
        if draw.random() < 0.8:
            workers[index].step()


class Sent:
    """Notes every copy that an engine sends."""

    def __init__(self, engine: Engine):
        self.copies: list[PageTransfer] = []
        self.num_delta = 0
        transfers: list[Any] = engine.transfers
        for transfer in transfers:
            transfer.send = self._noting(transfer.send)

    def _noting(self, send: Callable[[PageTransfer], None]) -> Callable[[PageTransfer], None]:
        def noting(copy: PageTransfer) -> None:
            self.copies.append(copy)
            self.num_delta += _is_delta(copy)
            send(copy)

        return noting


def _is_delta(copy: PageTransfer) -> bool:
    """Whether it is an admission's first copy, and leaves out pages that the decode pool had (not: awaits)."""
    found = copy.target.num_shared
    return copy.first == found > 0 and not copy.target.manager.waiting(copy.sequence)


def has_waiters(sequence: Running) -> bool:
    """Whether another sequence waits for one of its pages."""
    holdings = [held for held in (sequence.prefill.table, sequence.decode.table) if held is not None]
    return any(held.manager.has_waiters(held.pages) for held in holdings)


@dataclasses.dataclass
class Counters:
    """What a run has been through."""

    preemptions: int
    evictions: int
    waits: int
    duplicates: int
    restarts: int
    inherited: int
    transfers: int

    @classmethod
    def of(cls, engine: Engine) -> "Counters":
        pools = pools_of(engine)
        return cls(
            preemptions=sum(worker.num_preempted for worker in engine.decode_workers),
            evictions=sum(pool.manager.num_evicted for pool in pools),
            waits=sum(pool.cache_stats.num_waits for pool in pools),
            duplicates=sum(pool.cache_stats.num_duplicates for pool in pools),
            restarts=engine.admission.num_restarts,
            inherited=engine.admission.num_adopted,
            transfers=sum(transfer.stats.count for transfer in engine.transfers),
        )
