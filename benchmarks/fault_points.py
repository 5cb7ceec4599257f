"""The points of a request's life at which benchmarks/faults.py injects faults, on the real engine.

Pools and samplers are wrapped, since every device operation passes through them; host events are wrapped where the workers
call them. Each operation is a `Point`: its stage, the sequences that it is for, and what each kind of fault means there. A
`Fault` waits for its stage, takes the first sequence there as its victim, and happens to it once or each time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pshare_jax.engine.config import EngineConfig
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.failures import RowFailed
from pshare_jax.engine.interfaces import DecodeSpec, PrefillSpec
from pshare_jax.engine.kv.pool import PageTable, Pool
from pshare_jax.engine.sequence import PageTransfer, State
from pshare_jax.engine.sequence import Sequence as Running
from pshare_jax.model.paged_batch import DecodeBatch, PagedBatch, ScoreBatch

NEVER = 10**9
LATE_POLLS = 6
"""So many polls a delayed result takes."""


class Injected(RuntimeError):
    """An injected error."""


class Death(BaseException):
    """Ends a worker's thread wherever it is raised: no worker catches it."""


@dataclasses.dataclass
class Point:
    """An operation: `go()` does it. Without a function for a kind of fault, the fault does not exist there."""

    stage: str
    sequences: list[Running]
    go: Callable[[], Any]
    fail: Callable[[Exception], Any] | None = None
    late: Callable[[Exception], Any] | None = None
    delay: Callable[[], Any] | None = None
    drop: Callable[[], Any] | None = None


class Fault:
    """One fault: at the pass number `skip` through `stage` `inject(fault, point)` happens instead of the operation.

    With `each_time` it happens again whenever the victim is at that stage.
    """

    def __init__(
        self,
        stage: str,
        inject: Callable[["Fault", Point], Any],
        each_time: bool = False,
        skip: int = 0,
        on_fired: Callable[[], None] = lambda: None,
    ):
        self.stage, self.inject, self.each_time, self.skip = stage, inject, each_time, skip
        self.on_fired = on_fired
        self.victim: Running | None = None
        self.num_fired = 0
        self.engine: Engine
        self.others: Callable[[Any], None]
        """Lets the workers that do not have this store take a few turns."""

    def at(self, point: Point) -> Any:
        """Does the operation, or what the fault makes of it."""
        if not self._is_due(point):
            return point.go()
        self.num_fired += 1
        if self.num_fired == 1:
            self.on_fired()
        return self.inject(self, point)

    def _is_due(self, point: Point) -> bool:
        if point.stage != self.stage or not point.sequences:
            return False
        if self.victim is not None:
            return self.each_time and self.victim in point.sequences
        if self.skip:
            self.skip -= 1
            return False
        self.victim = point.sequences[0]
        return True


# --- results that are late or failed ------------------------------------------------------------------------------------


class Content:
    """Pages between two pools. They arrive after `polls` more polls, whatever the device does; with an `error` they fail."""

    def __init__(
        self, data: Any, error: Exception | None, stage: str, sequences: list[Running], fault: Fault | None = None
    ):
        self.data, self.error, self.stage, self.sequences, self._fault = data, error, stage, sequences, fault
        self.polls = 0

    def is_ready(self) -> bool:
        """Whether the pages have arrived."""
        if self.polls > 0:
            self.polls -= 1
            return False
        assert self._fault is not None
        fail, delay, drop = self._fail, partial(self._wait, LATE_POLLS), partial(self._wait, NEVER)
        return self._fault.at(Point(self.stage, self.sequences, lambda: True, fail, fail, delay, drop))

    def _fail(self, error: Exception) -> bool:
        self.error = error
        return True

    def _wait(self, polls: int) -> bool:
        self.polls = polls
        return False

    def block_until_ready(self) -> None:
        """Raises the error."""
        if self.error is not None:
            raise self.error
        self.data.block_until_ready()

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.block_until_ready()
        return np.asarray(self.data)


class Done:
    """The result of a prefill step that is late, or has failed after its dispatch."""

    def __init__(self, result: Any, error: Exception | None = None, polls: int = 0):
        self.result, self.error, self.polls = result, error, polls

    def is_ready(self) -> bool:
        """Whether the step has ended."""
        self.polls -= 1
        return self.polls < 0

    def block_until_ready(self) -> None:
        """Raises the error."""
        if self.error is not None:
            raise self.error
        self.result.block_until_ready()


class Unreadable:
    """An array of a failed step."""

    def __init__(self, error: Exception):
        self.error = error

    def block_until_ready(self) -> None:
        """Raises the error."""
        raise self.error

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise self.error


# --- pools --------------------------------------------------------------------------------------------------------------


class WatchedStore:
    """A pool's arrays; every operation over them is a point.

    `broken` is the error of a dispatched step that has failed: as on devices, all that is computed from its arrays fails
    with it, until they are replaced.
    """

    def __init__(self, inner: Any, num_pages: int, fault: Fault):
        self.inner, self.num_pages, self.fault = inner, num_pages, fault
        self.page_size, self.move_buckets = inner.page_size, inner.move_buckets
        self.broken: Exception | None = None

    def run(self, step: Any, params: Any, tokens: Any, rows: Any) -> Any:
        """A step."""
        stage, sequences = step_of(self.fault.engine, self, tokens, rows)

        def go() -> Any:
            return self._result(stage, self.inner.run(step, params, tokens, rows))

        def late(error: Exception) -> Any:
            result = self.inner.run(step, params, tokens, rows)
            self.broken = error
            return self._result(stage, result)

        def delay() -> Any:
            if stage == "prefill step":
                return Done(go(), self.broken, LATE_POLLS)
            return self._slowly(go)

        return self.fault.at(Point(stage, sequences, go, self._lose, late, delay))

    def _result(self, stage: str, result: Any) -> Any:
        """What a step over broken arrays returns; a decode step's logits fail in `WatchedSampler`."""
        if self.broken is None:
            return result
        if stage == "scoring step":
            return tuple(Unreadable(self.broken) for _ in result)
        return Done(result, self.broken) if stage == "prefill step" else result

    def empty_tables(self, num_slots: int, table_len: int) -> Any:
        """As the store."""
        return self.inner.empty_tables(num_slots, table_len)

    def put_table(self, tables: Any, slot: int, pages: Sequence[int]) -> Any:
        """As the store."""
        return self.inner.put_table(tables, slot, pages)

    def gather(self, ids: Sequence[int]) -> Any:
        """The content of pages."""
        stage, sequences = gather_of(self.fault.engine, self, ids)

        def go() -> Any:
            return Content(self.inner.gather(ids), self.broken, stage, sequences)

        def late(error: Exception) -> Any:
            content = go()
            content.error = error
            return content

        return self.fault.at(Point(stage, sequences, go, _raise, late, lambda: self._slowly(go)))

    def device_put(self, content: Any) -> Any:
        """Content on its way to this pool."""
        if not isinstance(content, Content):
            return self.inner.device_put(content)
        sequences, before = content.sequences, content.stage.removesuffix("gather")

        def go() -> Any:
            data = self.inner.device_put(content.data)
            return Content(data, content.error, f"{before}arrival", sequences, self.fault)

        return self.fault.at(Point(f"{before}device_put", sequences, go, _raise, None, lambda: self._slowly(go)))

    def scatter(self, ids: Sequence[int], content: Any) -> None:
        """Writes pages."""
        stage, sequences = scatter_of(self.fault.engine, self, ids)
        data = content.data if isinstance(content, Content) else content

        def go() -> None:
            self.inner.scatter(ids, data)

        def late(error: Exception) -> None:
            go()
            self.broken = error

        self.fault.at(Point(stage, sequences, go, self._lose, late, lambda: self._slowly(go)))

    def fill(self, ids: Sequence[int]) -> None:
        """Makes pages unusable."""
        self.inner.fill(ids)

    def reset(self) -> None:
        """New arrays."""
        self.broken = None
        self.inner.reset()

    def _lose(self, error: Exception) -> Any:
        """An operation that fails has taken the arrays, and gives none back."""
        self.inner.pages = ()
        raise error

    def _slowly(self, go: Callable[[], Any]) -> Any:
        """The other workers take turns before and after the operation, as their threads do."""
        assert not self.fault.engine.lock._is_owned(), "device work under the engine's lock"  # type: ignore[attr-defined]
        self.fault.others(self)
        result = go()
        self.fault.others(self)
        return result


class WatchedSampler:
    """Reads the logits of a step, which raises if the step has failed meanwhile."""

    def __init__(self, inner: Any, store: WatchedStore):
        self._inner, self._store = inner, store

    def lower(self, num_rows: int) -> Any:
        """As the sampler."""
        return self._inner.lower(num_rows)

    def lower_join(self) -> Any:
        """As the sampler."""
        return self._inner.lower_join()

    def new_rows(self, num_slots: int) -> Any:
        """As the sampler."""
        return WatchedRows(self._inner.new_rows(num_slots), self._store)


class WatchedRows:
    """The rows of `WatchedSampler`."""

    def __init__(self, inner: Any, store: WatchedStore):
        self._inner, self._store = inner, store

    @property
    def tokens(self) -> Any:
        """As the sampler's rows."""
        return self._inner.tokens

    def join(self, slot: int, sequence: Running) -> None:
        """As the sampler's rows; a point."""

        def fail(error: Exception) -> None:
            raise RowFailed(sequence) from error

        go = partial(self._inner.join, slot, sequence)
        self._store.fault.at(Point("sampling on the host", [sequence], go, fail))

    def prepare(self, *step: Any) -> Any:
        """As the sampler's rows; the fetch raises if a step before has broken the arrays."""
        choose = self._inner.prepare(*step)

        def chosen(logits: Any) -> Any:
            pending, broken = choose(logits), self._store.broken
            return pending if broken is None else Broken(broken)

        return chosen


@dataclasses.dataclass(frozen=True)
class Broken:
    """What a step over broken arrays has chosen."""

    error: Exception

    def fetch(self) -> Any:
        """Raises."""
        raise self.error


def _raise(error: Exception) -> Any:
    raise error


# --- whose operation it is ----------------------------------------------------------------------------------------------


def step_of(engine: Engine, store: Any, tokens: Any, rows: Any) -> tuple[str, list[Running]]:
    """A step's stage, and the sequences of its rows, which are known by their pages."""
    decodes, scores = isinstance(tokens, DecodeBatch), isinstance(rows, ScoreBatch)
    stage = "scoring step" if scores else "decode step" if decodes else "prefill step"
    state = State.PREFILLING if stage == "prefill step" else State.DECODING
    found = []
    for pages in _decoded_tables(store, tokens, rows) if decodes else _tables(rows.batch if scores else rows):
        found += [s for s in engine.live if s.state is state and _has_pages(table_of(s, stage), store, pages)]
    return stage, found


def _tables(batch: PagedBatch) -> list[list[int]]:
    return [pages for pages, count in zip(batch.page_table.tolist(), batch.query_lens, strict=True) if count]


def _decoded_tables(store: Any, rows: DecodeBatch, tables: Any) -> list[list[int]]:
    tables, real = np.array(tables), rows.slots < len(tables) - 1
    tables[rows.slots, rows.context_lens // store.page_size] = rows.new_pages
    return tables[rows.slots[real]].tolist()


def table_of(sequence: Running, stage: str) -> PageTable | None:
    """The page table that a step of this stage uses."""
    return sequence.prefill.table if stage == "prefill step" else sequence.decode.table


def _has_pages(held: PageTable | None, store: Any, pages: list[int]) -> bool:
    return held is not None and held.pool.store is store and bool(held.pages) and pages[: len(held.pages)] == held.pages


def in_flight(engine: Engine) -> list[PageTransfer]:
    """All transfers to decode pools."""
    return [transfer for transfers in engine.admission.in_flight for transfer in transfers]


def returning(engine: Engine) -> list[PageTransfer]:
    """All transfers back to prefill pools."""
    return [transfer for sequence in engine.live for transfer in sequence.prefill.returning]


def gather_of(engine: Engine, store: Any, ids: Sequence[int]) -> tuple[str, list[Running]]:
    """The stage and the sequence of a gather: a transfer, one that goes back, or a preemption."""
    for stage, transfers in (("gather", in_flight(engine)), ("return: gather", returning(engine))):
        for transfer in transfers:
            if transfer.content is None and transfer.source.pool.store is store and transfer.source_pages == list(ids):
                return stage, [transfer.sequence]
    return "preemption: save", _owners(engine, store, ids)


def scatter_of(engine: Engine, store: Any, ids: Sequence[int]) -> tuple[str, list[Running]]:
    """The same of a write."""
    for stage, transfers in (("scatter", in_flight(engine)), ("return: scatter", returning(engine))):
        for transfer in transfers:
            if transfer.target.pool.store is store and transfer.target_pages == list(ids):
                return stage, [transfer.sequence]
    return "preemption: restore", _owners(engine, store, ids)


def _owners(engine: Engine, store: Any, ids: Sequence[int]) -> list[Running]:
    held = [(sequence, sequence.decode.table) for sequence in engine.live]
    return [
        s for s, table in held if table and table.pool.store is store and set(ids) <= set(table.pages[len(s.keys) :])
    ]


# --- engines ------------------------------------------------------------------------------------------------------------


def watched_engine(built: Engine, fault: Fault, decode_pages: int | None = None) -> Engine:
    """A new engine over the specs, weights and arrays of another, with points at all stages; the other is not used again.

    `decode_pages` is the number of pages that a decode pool lends.
    """
    pools: dict[int, Pool] = {}

    def watched(old: Pool, usable: int | None = None) -> Pool:
        if id(old) not in pools:
            inner = old.store.inner if isinstance(old.store, WatchedStore) else old.store
            inner.reset()  # type: ignore[union-attr]
            store = WatchedStore(inner, inner.num_pages if usable is None else usable + 1, fault)  # type: ignore[union-attr]
            pools[id(old)] = Pool(old.name, store, debug=True)
        return pools[id(old)]

    colocated = {id(spec.pool) for spec in built.prefill_specs} & {id(spec.pool) for spec in built.decode_specs}
    decode: list[DecodeSpec] = []
    for spec in built.decode_specs:
        pool = watched(spec.pool, decode_pages)
        assert isinstance(pool.store, WatchedStore)
        sampler: Any = spec.sampler
        decode.append(dataclasses.replace(spec, pool=pool, sampler=WatchedSampler(sampler, pool.store)))
    prefill: list[PrefillSpec] = [dataclasses.replace(spec, pool=watched(spec.pool)) for spec in built.prefill_specs]
    assert colocated or len(pools) == len(prefill) + len(decode)
    config: EngineConfig = built.config
    fault.engine = Engine(prefill, decode, built.facts, config)
    _watch_host(fault.engine, fault)
    return fault.engine


def _watch_host(engine: Engine, fault: Fault) -> None:
    """Points at what the workers do on the host."""
    admission = engine.admission
    admit, start = admission.admit, admission.start_decoding
    skipped = [0]

    def admits(worker: int) -> list[Running]:
        if skipped[0]:
            skipped[0] -= 1
            return []

        def delay() -> list[Running]:
            skipped[0] = LATE_POLLS
            return []

        waiting = list(admission.waiting[worker]) if admission.may_admit[worker] else []
        return fault.at(Point("admission", waiting, lambda: admit(worker), _raise, None, delay))

    def starts(worker: int) -> list[Running]:
        started = start(worker)

        return fault.at(Point("start of decoding", started, lambda: started, _raise)) if started else started

    admission.admit = admits  # type: ignore[method-assign]
    admission.start_decoding = starts  # type: ignore[method-assign]
