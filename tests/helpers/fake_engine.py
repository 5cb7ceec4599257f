"""Engines put together from the fakes of serving_fakes.py, and a client that submits requests and keeps what comes up."""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving_fakes import (
    EOS,
    VOCAB,
    ByteTokenizer,
    Echo,
    FakeDecode,
    FakePrefill,
    FakeSampler,
    FakeStore,
    Gate,
    Script,
)

from pshare_jax.engine.config import BatchConfig, EngineConfig, LimitsConfig
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import DecodeSpec, ModelFacts, PrefillSpec
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.request import Event, Request
from pshare_jax.engine.router import Policy, Route
from pshare_jax.engine.sequence import Sequence as Running
from pshare_jax.engine.sequence import State
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.text.grammar import GrammarCompiler

PAGE = 4
"""Tokens of a page, unless a test says otherwise."""


@dataclass
class Fakes:
    """An engine and everything fake in it; `faults` must stay empty."""

    engine: Engine
    prefill: list[FakePrefill]
    decode: dict[str, FakeDecode]
    prefill_stores: list[FakeStore]
    decode_stores: list[FakeStore]
    faults: list[str]

    def hold(self, token: int, **gate: Any) -> Gate:
        """A gate for the copies that hold this token, on their way to any decode worker."""
        made = Gate(**gate)
        for store in self.decode_stores:
            store.gates[token] = made
        return made

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.step()

    def step_until(self, reached: Callable[[], bool], limit: int = 500) -> None:
        for _ in range(limit):
            if reached():
                return
            self.engine.step()
        raise AssertionError("that does not happen")

    def run(self, limit: int = 5000) -> None:
        """Steps until nothing is left to do, and proves that every page came back and no step read a wrong one."""
        self.step_until(lambda: self.engine.idle, limit)
        self.check()

    def check(self) -> None:
        self.engine.admission.check()
        assert self.faults == []


def make_engine(
    tasks: Mapping[str, Sequence[int] | Echo],
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    colocated: bool = False,
    devices: tuple[list[set[int]], list[set[int]]] | None = None,
    prefill_tasks: list[list[str]] | None = None,
    page_size: int = PAGE,
    pages: int = 64,
    decode_pages: int | None = None,
    moves: Sequence[int] = (2, 4),
    chunk: int = 16,
    rows: int = 4,
    debug: bool = True,
    key_of: Callable[[str], str] = lambda task: "base",
    max_len: int | None = None,
    max_requests: int = 256,
    stall_seconds: float = 300.0,
    policy: Policy = "prefix",
    pinned_share: float = 0.5,
    clock: Callable[[], float] = time.monotonic,
    pipelined: bool = True,
) -> Fakes:
    """An engine whose tasks say what their script or echo says; tasks with the very same one have the same weights.

    All decode workers have all tasks. Colocated, the i-th prefill and the i-th decode worker have one pool.
    """
    faults: list[str] = []
    made = {id(one): FakeDecode(one if isinstance(one, Echo) else Script(one), faults) for one in tasks.values()}
    decode = {name: made[id(one)] for name, one in tasks.items()}
    prefill = [FakePrefill(faults) for _ in range(num_prefill)]
    stores = [FakeStore(pages, page_size, moves, faults) for _ in prefill]
    others = [FakeStore(decode_pages or pages, page_size, moves, faults) for _ in range(num_decode)]
    kind = functools.partial(Pool, debug=debug, pinned_share=pinned_share, clock=clock)
    pools = [kind(f"prefill pool {i}", store) for i, store in enumerate(stores)]
    decode_pools = pools if colocated else [kind(f"decode pool {i}", store) for i, store in enumerate(others)]
    if devices is None:
        first = 0 if colocated else num_prefill
        devices = [{i} for i in range(num_prefill)], [{first + i} for i in range(num_decode)]
    max_len = max_len or page_size * min(pool.num_usable for pool in (*pools, *decode_pools))
    engine = Engine(
        [
            PrefillSpec(weights, pool, on, None if prefill_tasks is None else prefill_tasks[i])
            for i, (weights, pool, on) in enumerate(zip(prefill, pools, devices[0], strict=True))
        ],
        [DecodeSpec(dict(decode), pool, FakeSampler(), on) for pool, on in zip(decode_pools, devices[1], strict=True)],
        ModelFacts(
            key_of,
            ByteTokenizer().detokenizer,
            VOCAB,
            max_len,
            page_bytes=10,
            stop_ids=frozenset({EOS}),
            grammars=GrammarCompiler(ByteTokenizer(), VOCAB),
        ),
        EngineConfig(
            tasks=tasks,
            batch=BatchConfig(chunk, rows, pipelined),
            routing=policy,
            limits=LimitsConfig(max_requests, stall_seconds),
        ),
    )
    return Fakes(engine, prefill, decode, stores, stores if colocated else others, faults)


class Client:
    """Submits requests and keeps what comes up."""

    def __init__(self, fakes: Fakes):
        self.fakes, self.engine = fakes, fakes.engine
        self.events: dict[str, list[Event]] = {}
        self.sequences: dict[str, Running] = {}
        self._names = itertools.count()

    def ask(
        self,
        name: str = "",
        prompt: Sequence[int] = (1, 2, 3),
        task: str = "t",
        route: Route | None = None,
        **fields: Any,
    ) -> str:
        name = name or f"request {next(self._names)}"
        events = self.events[name] = []
        room = self.engine.facts.max_len - len(prompt)
        fields = {"max_tokens": min(50, room), "stop_ids": frozenset({EOS}), **fields}
        handle = self.engine.submit(Request(name, task, tuple(prompt), **fields), events.append, route)
        self.sequences[name] = handle.sequence
        return name

    def text(self, name: str) -> str:
        return "".join(event.text for event in self.events[name])

    def ids(self, name: str) -> list[int]:
        return self.sequences[name].decode.completion_ids

    def state(self, name: str) -> State:
        return self.sequences[name].state

    def cached(self, name: str) -> int:
        return self.events[name][-1].cached_tokens

    def end(self, name: str) -> str | None:
        """Why it ended: the finish reason or the error."""
        last = self.events[name][-1]
        assert [event.last for event in self.events[name]].count(True) == 1
        return last.finish_reason or last.error

    def ended(self, name: str) -> bool:
        return bool(self.events[name]) and self.events[name][-1].last


class Load:
    """Clients that ask again as soon as they have an answer, each time with a prompt of their own."""

    def __init__(self, client: Client, count: int, length: int = 4, **fields: Any):
        self._client, self._length, self._fields = client, length, fields
        self._current: list[str | None] = [None] * count
        self._prompts = itertools.count()
        self.num_answers = 0

    def ask_again(self) -> None:
        for index, name in enumerate(self._current):
            if name is None or self._client.ended(name):
                self.num_answers += name is not None
                self._current[index] = self._client.ask(prompt=self._prompt(), **self._fields)

    def _prompt(self) -> list[int]:
        number = next(self._prompts)
        return [10 + number % 200, *[number // 200 % 250] * (self._length - 1)]


@dataclass(frozen=True)
class Call:
    """A device call of a worker: its kind (prefill, decode or score), its token slots and its rows of real tokens."""

    kind: str
    num_slots: int
    rows: list[tuple[int, ...]]


def watch_calls(store: FakeStore) -> list[Call]:
    """The calls on this pool from now on, in their order."""
    calls: list[Call] = []
    run = store.run

    def watched(step: Any, params: Any, tokens: Any, rows: Any) -> Any:
        if isinstance(tokens, DecodeBatch):
            slots = tokens.slots.tolist()
            calls.append(Call("decode", len(slots), [(int(tokens.tokens[s]),) for s in slots if s < len(rows) - 1]))
        else:
            counts = getattr(rows, "batch", rows).query_lens
            real = [tuple(row[:count].tolist()) for row, count in zip(tokens, counts, strict=True) if count]
            calls.append(Call(step.__name__.strip("_"), tokens.size, real))
        return run(step, params, tokens, rows)

    store.run = watched
    return calls
