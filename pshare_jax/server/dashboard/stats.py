"""The live page's data: tasks, sessions, tokens prefilled and reused, KV pages, latency over the last minutes.

The engine reports every ended request; the rest is read from the engine at each snapshot. No prompt and no session key is
kept: a session has a label, a hash of its key under a random key of this process.
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
from pshare_jax.engine.sequence import Sequence, State

WINDOW_SECONDS = 600
BUCKET_SECONDS = 5
MAX_RECORDS = 10_000
MAX_SESSIONS = 100
QUEUED = (State.WAITING, State.PREEMPTED)
ENDS = (State.FINISHED, State.ABORTED, State.FAILED)


class _Record(NamedTuple):
    """An ended request: its end, the seconds to its first token and, if it finished, to its end."""

    ended: float
    task: str
    first: float | None
    whole: float | None


@dataclass
class _Totals:
    """Totals of a task's ended requests since the start; requests that were never admitted count no tokens."""

    ended: Counter[State] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


@dataclass
class _Session:
    """Totals of a session's ended requests; `seen` is the end of the last of them."""

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


class DashboardStats:
    """Statistics since this object was made (after the warm-up); each choice of a call counts as a request.

    All state is under the engine's lock.
    """

    def __init__(self, engine: Engine, base: str):
        self._engine, self._base = engine, base
        self._started = time.monotonic()
        self._label_key = secrets.token_bytes(32)
        self._records: deque[_Record] = deque(maxlen=MAX_RECORDS)
        self._totals: defaultdict[str, _Totals] = defaultdict(_Totals)
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._without_session = 0
        with engine.lock:
            self._prefilled_before, self._reused_before = self._prompt_tokens()
        engine.on_end.append(self.record_end)

    def record_end(self, sequence: Sequence) -> None:
        """Records an ended request; called under the engine's lock."""
        now, request = time.monotonic(), sequence.request
        first = None if sequence.first_token is None else sequence.first_token - sequence.arrived
        whole = now - sequence.arrived if sequence.state is State.FINISHED else None
        self._records.append(_Record(now, request.task, first, whole))
        totals = self._totals[request.task]
        totals.ended[sequence.state] += 1
        session = self._session(request.session, request.task, now)
        if sequence.admitted is None:
            return
        for counted in (totals, session) if session else (totals,):
            counted.prompt_tokens += len(request.prompt)
            counted.cached_tokens += sequence.cached_tokens
        totals.generated_tokens += len(sequence.decode.completion_ids)

    def snapshot(self) -> dict[str, Any]:
        """All statistics as JSON values; seconds are durations, "seconds_ago" counts back from now."""
        # Only copies are made under the lock: sorting 10,000 records must not delay a step.
        with self._engine.lock:
            live = [_Request(s.request.task, s.state in QUEUED, s.request.session) for s in self._engine.live]
            records = list(self._records)
            served = list(self._engine.tasks)
            # Unloaded tasks keep their totals.
            names = dict.fromkeys([*served, *self._totals])
            totals = {task: replace(self._totals[task], ended=Counter(self._totals[task].ended)) for task in names}
            sessions = {label: replace(session) for label, session in self._sessions.items()}
            without = self._without_session
            pools = [{"name": pool.name, **pool.num_in_state} for pool in self._engine.pools]
            prefilled, reused = self._prompt_tokens()
            rates = [rate for worker in self._engine.prefill_workers if (rate := worker.speed.best)]
        now = time.monotonic()
        recent = [record for record in records if record.ended > now - WINDOW_SECONDS]
        by_task = defaultdict(list)
        for record in recent:
            by_task[record.task].append(record)
        waiting = Counter(request.task for request in live if request.queued)
        running = Counter(request.task for request in live if not request.queued)
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
                    "ended": {state.value: total.ended[state] for state in ENDS},
                    "prompt_tokens": total.prompt_tokens,
                    "cached_tokens": total.cached_tokens,
                    "generated_tokens": total.generated_tokens,
                    **_latency(by_task[task]),
                }
                for task, total in totals.items()
            ],
            "sessions": self._session_rows(sessions, live, now),
            "ended_without_session": without,
            "prefill": _prefill_savings(
                prefilled - self._prefilled_before, reused - self._reused_before, max(rates, default=None)
            ),
            "pools": pools,
            "latency": {**_latency(recent), "bucket_seconds": BUCKET_SECONDS, "buckets": _buckets(recent, now)},
        }

    def label(self, session: str) -> str:
        """A session key's label: constant in this process, and not reversible."""
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

    def _session_rows(self, ended: dict[str, _Session], live: list[_Request], now: float) -> list[dict[str, Any]]:
        """At most MAX_SESSIONS sessions: first those with live requests, then by last use."""
        num_live: Counter[str] = Counter()
        for request in live:
            if request.session:
                label = self.label(request.session)
                num_live[label] += 1
                session = ended.setdefault(label, _Session(request.task, now))
                session.task, session.seen = request.task, now
        ordered = sorted(ended.items(), key=lambda item: (item[0] not in num_live, -item[1].seen))
        return [
            {
                "label": label,
                "live": num_live[label],
                "calls": session.calls,
                "prompt_tokens": session.prompt_tokens,
                "cached_tokens": session.cached_tokens,
                "last_task": session.task,
                "seconds_ago": round(now - session.seen, 1),
            }
            for label, session in ordered[:MAX_SESSIONS]
        ]

    def _prompt_tokens(self) -> tuple[int, int]:
        """Tokens processed by prefill steps, and prompt tokens whose KV was reused."""
        prefilled = sum(worker.stats.tokens for worker in self._engine.prefill_workers)
        return prefilled, sum(pool.cache_stats.cached_tokens for pool in self._engine.pools)


def _prefill_savings(prefilled: int, reused: int, rate: float | None) -> dict[str, Any]:
    """Tokens are counted; the seconds saved are estimated from the best measured rate of a prefill worker."""
    return {
        "prefilled_tokens": prefilled,
        "reused_tokens": reused,
        "tokens_per_second": rate and round(rate, 1),
        "seconds_saved_estimate": rate and round(reused / rate, 3),
    }


def _buckets(records: Iterable[_Record], now: float) -> list[dict[str, Any]]:
    """The non-empty intervals of BUCKET_SECONDS, oldest first; their boundaries do not move with `now`."""
    groups = defaultdict(list)
    for record in records:
        groups[record.ended // BUCKET_SECONDS].append(record)
    return [
        {"seconds_ago": round(now - number * BUCKET_SECONDS, 1), "ended": len(group), **_latency(group)}
        for number, group in sorted(groups.items())
    ]


def _latency(records: Items[_Record]) -> dict[str, Any]:
    return {
        "ttft_seconds": _percentiles(record.first for record in records),
        "request_seconds": _percentiles(record.whole for record in records),
    }


def _percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Nearest rank; None without values."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    return {name: round(ordered[math.ceil(len(ordered) * part) - 1], 4) for name, part in (("p50", 0.5), ("p95", 0.95))}
