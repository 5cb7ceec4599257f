"""Runs sessions against one server: so many at once, or as they arrive. A session's calls follow one another."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.agents_load.client import CallRecord, Client
from benchmarks.agents_load.workload import Session


@dataclass
class SessionRecord:
    """A session's outcome: the times of its begin (with arrivals: when it arrived, though it may have waited) and end, and
    the calls that were not sent because one before them failed.
    """

    name: str
    began: float
    ended: float = 0.0
    num_unsent: int = 0


@dataclass
class Run:
    """All calls and sessions of a run; times are seconds of `time.perf_counter`, `began` its start."""

    began: float
    calls: list[CallRecord] = field(default_factory=list)
    sessions: list[SessionRecord] = field(default_factory=list)


async def play(
    client: Client, sessions: Sequence[Session], at_once: int, arrivals: bool, on_call: Callable[[CallRecord], None]
) -> Run:
    """Runs all sessions, at most `at_once` together; `arrivals`: each starts when it arrives, else as soon as it may.

    `on_call` is called with every ended call.
    """
    run = Run(time.perf_counter())
    gate = asyncio.Semaphore(at_once)

    async def one(session: Session) -> None:
        arrived = run.began + session.arrival
        if arrivals:
            await _until(arrived)
        async with gate:
            record = SessionRecord(session.name, arrived if arrivals else time.perf_counter())
            run.sessions.append(record)
            record.ended = record.began
            for number, call in enumerate(session.calls):
                await _until(max(record.ended + call.delay, run.began + call.earliest))
                answer = await client.send(session.name, call)
                run.calls.append(answer)
                on_call(answer)
                record.ended = answer.ended
                if answer.failure is not None:
                    record.num_unsent = len(session.calls) - number - 1
                    break

    async with asyncio.TaskGroup() as group:
        for session in sessions:
            group.create_task(one(session))
    return run


async def _until(moment: float) -> None:
    await asyncio.sleep(max(moment - time.perf_counter(), 0))
