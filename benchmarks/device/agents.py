"""W2: sessions of agents on an engine in this process, whose LoRA tasks share the base's prefill or prefill for themselves.

In each turn a session calls every task after the other on its growing context; all sessions run at once. A run is cut after
`Sizes.agent_seconds`, and its numbers are those of the calls that have ended.
"""

import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from benchmarks.agents_load.workload import Call, Session, make_sessions
from benchmarks.device import counts
from benchmarks.device.check import Cell, Check
from benchmarks.device.engine import compile_only, make_engine
from benchmarks.device.models import random_adapter, random_model
from benchmarks.device.sizes import PAGE, RANK, TARGETS
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Event, Request
from pshare_jax.engine.shapes import pages_for
from pshare_jax.server.compile_counter import count_compilations
from pshare_jax.share.model import Model

Sharing = Literal["shared", "isolated"]


@dataclass
class Answered:
    """A call's times in seconds of `time.perf_counter`, and what it has got."""

    began: float
    first: float | None = None
    ended: float = 0.0
    tokens: int = 0
    failure: str | None = None


class Agent:
    """A session: it sends its next call when the one before has ended."""

    def __init__(self, session: Session, engine: Engine, ended: "queue.SimpleQueue[Agent]"):
        self.answered: list[Answered] = []
        self._session, self._engine, self._ended = session, engine, ended
        self._calls: Iterator[Call] = iter(session.calls)

    def send(self) -> bool:
        """Sends the next call; False if there is none."""
        call = next(self._calls, None)
        if call is None:
            return False
        name, number = self._session.name, len(self.answered)
        self.answered.append(Answered(time.perf_counter()))
        request = Request(f"{name}-{number}", call.model, call.prompt, call.output, session=name)
        self._engine.submit(request, self._take)
        return True

    def _take(self, event: Event) -> None:
        """Called by the engine's thread."""
        call, now = self.answered[-1], time.perf_counter()
        if event.token_id is not None:
            call.tokens += 1
            call.first = call.first or now
        if event.last:
            call.ended, call.failure = now, event.failure
            self._ended.put(self)


def run(check: Check) -> None:
    """Shared and isolated for each number of tasks."""
    for num_tasks in check.sizes.agent_tasks:
        rates = {}
        for sharing in ("shared", "isolated"):
            name = f"{num_tasks} LoRA tasks, {sharing}"
            cell = check.measure(name, lambda sharing=sharing, num=num_tasks: _one(check, num, sharing))
            rates[sharing] = None if cell is None else cell["calls_s"]
        if rates["shared"] and rates["isolated"]:
            ratio = rates["shared"] / rates["isolated"]
            check.keep({"name": f"{num_tasks} LoRA tasks, shared / isolated", "calls_s": ratio})


def _one(check: Check, num_tasks: int, sharing: Sharing) -> Cell:
    tasks = [f"task{number}" for number in range(num_tasks)]
    workload = replace(check.sizes.agents, vocab_size=check.config.vocab_size)
    sessions = make_sessions(workload, tasks, seed=0)
    longest = max(len(call.prompt) + call.output for session in sessions for call in session.calls)
    # The model's own limit would make page tables longer than any session.
    config = replace(check.config, max_len=PAGE * pages_for(longest + 1, PAGE))
    model = random_model(config, check.mesh, check.dtype)
    modules = {name: random_adapter(model, seed) for seed, name in enumerate(tasks, start=1)}
    pages = _pages(check, model, num_tasks)
    sizes = check.sizes
    engine = make_engine(model, modules, sharing, pages=pages, chunk=sizes.chunk, rows=max(sizes.agent_rows))
    shapes = {*((rows,) for rows in sizes.agent_rows), *((1, tokens) for tokens in (*sizes.agent_chunks, sizes.chunk))}
    compile_only(engine, frozenset(shapes))
    counter = count_compilations()
    compiled, prefilled = counter.count, _prefilled(engine)
    engine.start()
    try:
        agents, seconds = play(engine, sessions, min(check.sizes.agent_seconds, max(check.clock.left, 1.0)))
        numbers = _numbers([call for agent in agents for call in agent.answered if call.ended], seconds)
        of_sessions = sum(len(session.calls) for session in sessions)
        return {
            **numbers,
            "calls_of": of_sessions,
            "prefilled": _prefilled(engine) - prefilled,
            "pages": pages,
            "compiled": counter.count - compiled,
        }
    finally:
        engine.stop()


def _pages(check: Check, model: Model, num_tasks: int) -> int:
    """Pages of all pools together: room for every session's context in every task, or what memory there is."""
    page_bytes = PAGE * counts.kv_bytes(check.config, check.item)
    wanted = (check.sizes.agents.sessions + 1) * num_tasks * pages_for(model.config.max_len, PAGE)
    if check.memory is None:
        return wanted
    adapters = 2 * num_tasks * counts.adapter_weights(check.config, RANK, TARGETS)
    held = check.item * (counts.all_weights(check.config) + adapters)
    return min(wanted, int((0.75 * check.memory - held) // page_bytes))


def _prefilled(engine: Engine) -> int:
    return sum(worker.stats.tokens for worker in engine.prefill_workers)


def play(engine: Engine, sessions: Sequence[Session], limit: float) -> tuple[list[Agent], float]:
    """All agents after their last calls or after `limit` seconds, and the seconds that this took.

    Raises:
        RuntimeError: a call has failed.
    """
    ended: queue.SimpleQueue[Agent] = queue.SimpleQueue()
    agents = [Agent(session, engine, ended) for session in sessions]
    began = time.perf_counter()
    live = sum(agent.send() for agent in agents)
    while live and (left := began + limit - time.perf_counter()) > 0:
        try:
            agent = ended.get(timeout=left)
        except queue.Empty:
            break
        if (failure := agent.answered[-1].failure) is not None:
            raise RuntimeError(failure)
        live -= not agent.send()
    return agents, time.perf_counter() - began


def _numbers(calls: Sequence[Answered], seconds: float) -> Cell:
    """Rates, and times of calls and to first tokens in seconds."""
    if not calls:
        raise RuntimeError(f"no call ended within {seconds:.0f} s")
    took = np.percentile([call.ended - call.began for call in calls], (50, 95))
    first = np.percentile([call.first - call.began for call in calls if call.first is not None], (50, 95))
    return {
        "calls_s": len(calls) / seconds,
        "tokens_s": sum(call.tokens for call in calls) / seconds,
        "call_p50_s": float(took[0]),
        "call_p95_s": float(took[1]),
        "ttft_p50_s": float(first[0]),
        "ttft_p95_s": float(first[1]),
        "seconds": seconds,
        "calls": len(calls),
    }
