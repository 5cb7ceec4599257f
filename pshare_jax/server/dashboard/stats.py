"""What the live page shows: tasks, sessions, tokens prefilled and reused, KV pages, latency over the last minutes.

It is told of every request that ends and reads the rest from the engine when asked. It keeps no prompt and no session
key: a session has a label, a keyed hash of its key that means nothing outside this process. Host-side, imports no jax.
"""

import hashlib
import math
import secrets
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any, NamedTuple

from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Sequence, State

WINDOW_SECONDS = 600
BUCKET_SECONDS = 5
MAX_RECORDS = 10_000
MAX_SESSIONS = 100
QUEUED = (State.WAITING, State.PREEMPTED)
ENDS = (State.FINISHED, State.ABORTED, State.FAILED)


class _Record(NamedTuple):
    """An ended request: when, and the seconds to its first token and, if it was finished, to its end."""

    ended: float
    task: str
    first: float | None
    whole: float | None


@dataclass
class _Totals:
    """Of a task's ended requests, since the start. What never got to prefill has no tokens here."""

    ended: Counter[State] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


@dataclass
class _Session:
    """Of a session's ended requests; `seen` is when the last of them ended."""

    task: str
    seen: float
    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class _Request(NamedTuple):
    """A live request."""

    task: str
    queued: bool
    session: str | None


class Live:
    """Everything since now (the answers of the warm-up, before, are not counted); each choice of a call is a request.

    `tasks` are the names that are served; they may change while the server runs.
    """

    def __init__(self, engine: Engine, tasks: Items[str], base: str):
        self._engine, self._base, self._tasks = engine, base, tasks
        self._started = time.monotonic()
        self._label_key = secrets.token_bytes(32)
        self._records: deque[_Record] = deque(maxlen=MAX_RECORDS)
        self._totals: defaultdict[str, _Totals] = defaultdict(_Totals)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._without_session = 0
        with engine.lock:
            self._prefilled_before, self._reused_before = self._prompt_tokens()
        engine.on_end.append(self.ended)

    def ended(self, sequence: Sequence) -> None:
        """Notes a request that has just ended; called under the engine's lock."""
        now, request = time.monotonic(), sequence.request
        first = None if sequence.first_token is None else sequence.first_token - sequence.came
        whole = now - sequence.came if sequence.state is State.FINISHED else None
        self._records.append(_Record(now, request.task, first, whole))
        totals = self._totals[request.task]
        totals.ended[sequence.state] += 1
        session = self._session(request.session, request.task, now)
        if sequence.admitted is None:
            return
        for counted in (totals, session) if session else (totals,):
            counted.prompt_tokens += len(request.prompt)
            counted.cached_tokens += sequence.cached_tokens
        totals.generated_tokens += len(sequence.completion_ids)

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON values; seconds are durations, "seconds_ago" is counted from now."""
        # Only copies are made under the lock: sorting 10,000 records must not hold up a step.
        with self._engine.lock:
            live = [_Request(one.request.task, one.state in QUEUED, one.request.session) for one in self._engine.live]
            records = list(self._records)
            served = list(self._tasks)
            # Also those that have gone, with what they did.
            names = dict.fromkeys([*served, *self._totals])
            totals = {task: replace(self._totals[task], ended=Counter(self._totals[task].ended)) for task in names}
            sessions = {label: replace(one) for label, one in self._sessions.items()}
            without = self._without_session
            pools = [{"name": pool.name, **pool.num_in_state} for pool in self._engine.pools]
            prefilled, reused = self._prompt_tokens()
            rates = [rate for worker in self._engine.prefill_workers if (rate := worker.speed.best)]
        now = time.monotonic()
        recent = [one for one in records if one.ended > now - WINDOW_SECONDS]
        by_task = defaultdict(list)
        for one in recent:
            by_task[one.task].append(one)
        waiting = Counter(one.task for one in live if one.queued)
        running = Counter(one.task for one in live if not one.queued)
        return {
            "version": version("pshare_jax"),
            "base": self._base,
            "healthy": self._engine.healthy,
            "uptime_seconds": round(now - self._started, 1),
            "page_size": self._engine.page_size,
            "window": {"seconds": WINDOW_SECONDS, "requests": len(recent), "full": len(recent) == MAX_RECORDS},
            "tasks": [
                {
                    "name": task,
                    "served": task in served,
                    "running": running[task],
                    "waiting": waiting[task],
                    "ended": {state.value: one.ended[state] for state in ENDS},
                    "prompt_tokens": one.prompt_tokens,
                    "cached_tokens": one.cached_tokens,
                    "generated_tokens": one.generated_tokens,
                    **_latency(by_task[task]),
                }
                for task, one in totals.items()
            ],
            "sessions": self._told_sessions(sessions, live, now),
            "ended_without_session": without,
            "prefill": _saved(
                prefilled - self._prefilled_before, reused - self._reused_before, max(rates, default=None)
            ),
            "pools": pools,
            "latency": {**_latency(recent), "bucket_seconds": BUCKET_SECONDS, "buckets": _buckets(recent, now)},
        }

    def label(self, session: str) -> str:
        """What stands for a session key: the same in this process, and not to be undone."""
        return hashlib.blake2b(session.encode(errors="surrogatepass"), digest_size=4, key=self._label_key).hexdigest()

    def _session(self, key: str | None, task: str, now: float) -> _Session | None:
        if not key:
            self._without_session += 1
            return None
        label = self.label(key)
        session = self._sessions.setdefault(label, _Session(task, now))
        session.task, session.seen = task, now
        session.calls += 1
        self._sessions.move_to_end(label)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return session

    def _told_sessions(self, ended: dict[str, _Session], live: list[_Request], now: float) -> list[dict[str, Any]]:
        """Those with live requests first, then the last seen first; at most MAX_SESSIONS."""
        num_live: Counter[str] = Counter()
        for one in live:
            if one.session:
                label = self.label(one.session)
                num_live[label] += 1
                session = ended.setdefault(label, _Session(one.task, now))
                session.task, session.seen = one.task, now
        ordered = sorted(ended.items(), key=lambda item: (item[0] not in num_live, -item[1].seen))
        return [
            {
                "label": label,
                "live": num_live[label],
                "calls": one.calls,
                "prompt_tokens": one.prompt_tokens,
                "cached_tokens": one.cached_tokens,
                "last_task": one.task,
                "seconds_ago": round(now - one.seen, 1),
            }
            for label, one in ordered[:MAX_SESSIONS]
        ]

    def _prompt_tokens(self) -> tuple[int, int]:
        """Tokens fed to prefill steps, and prompt tokens that needed none."""
        prefilled = sum(worker.stats.tokens for worker in self._engine.prefill_workers)
        return prefilled, sum(pool.cache_stats.cached_tokens for pool in self._engine.pools)


def _saved(prefilled: int, reused: int, rate: float | None) -> dict[str, Any]:
    """Tokens are counted; seconds are what the reused ones would have taken at the best measured rate of a worker."""
    return {
        "prefilled_tokens": prefilled,
        "reused_tokens": reused,
        "tokens_per_second": rate and round(rate, 1),
        "seconds_saved_estimate": rate and round(reused / rate, 3),
    }


def _buckets(records: Iterable[_Record], now: float) -> list[dict[str, Any]]:
    """The stretches of BUCKET_SECONDS in which a request ended, oldest first; their borders do not move with `now`."""
    groups = defaultdict(list)
    for one in records:
        groups[one.ended // BUCKET_SECONDS].append(one)
    return [
        {"seconds_ago": round(now - number * BUCKET_SECONDS, 1), "ended": len(group), **_latency(group)}
        for number, group in sorted(groups.items())
    ]


def _latency(records: Items[_Record]) -> dict[str, Any]:
    return {
        "ttft_seconds": _percentiles(one.first for one in records),
        "request_seconds": _percentiles(one.whole for one in records),
    }


def _percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Nearest rank; None where nothing was measured."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return {name: round(ordered[math.ceil(len(ordered) * part) - 1], 4) for name, part in (("p50", 0.5), ("p95", 0.95))}
