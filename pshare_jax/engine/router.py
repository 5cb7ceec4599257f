"""Chooses the workers of a request: the decode worker by task and load, the prefill worker by policy.

The engine tells it of every request's begin, prefill progress and end, under the engine's one lock (none in here). Load
is outstanding work, running or queued, never cached pages. Host-side, imports no jax.
"""

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pshare_jax.engine.kv.keys import PageKey
from pshare_jax.engine.kv.page_manager import expect
from pshare_jax.errors import PshareError

Policy = Literal["prefix", "round_robin", "least_loaded"]

MAX_REMEMBERED = 65_536  # sessions, and as many ends of cached prefixes
OVERLOAD = 2  # affinity may cost so many times what the quickest worker takes,
SLACK_TOKENS = 512  # and about one prefill step more: a shorter queue is none
DECAY = 0.5 ** (1 / 64)  # assigned work counts half after 64 requests


@dataclass(frozen=True)
class Route:
    """The prefill worker and the decode worker of a request, by index."""

    prefill: int
    decode: int


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that has not ended: where it is, and how many tokens its prefill worker still has to encode for it."""

    route: Route
    context_len: int
    keys: Sequence[PageKey]
    outstanding: int = 0
    released: bool = False


class Router:
    """Keeps the books on all workers and asks the policy for a prefill worker.

    `prefix` goes where the prompt's KV is (see `_Affinity`); `round_robin` takes the workers in turn, `least_loaded`
    the least outstanding tokens: both know neither sessions nor caches. Decode load counts requests: a decode step
    costs by its rows, and nobody knows how long an answer gets. Among equals the first worker is chosen.
    """

    def __init__(
        self,
        num_prefill: int,
        decode_tasks: Sequence[Collection[str]],
        policy: Policy,
        page_size: int,
        prefill_tasks: Sequence[Collection[str]] | None = None,
    ):
        self.decode_tasks = decode_tasks
        self.prefill_load = [0] * num_prefill
        self.decode_load = [0] * len(decode_tasks)
        self._policy = policy
        self._page_size = page_size
        self._prefill_tasks = prefill_tasks
        self._turns: Counter[tuple[int, ...]] = Counter()
        self._tickets: list[set[Ticket]] = [set() for _ in range(num_prefill)]
        self._affinity = _Affinity(self.prefill_load)

    def assign(
        self,
        task: str,
        session: str | None,
        context_len: int,
        keys: Sequence[PageKey],
        cached_pages: Callable[[int], int],
    ) -> Ticket:
        """Chooses the workers of one more request and counts it on them.

        Args:
            task: what both workers must be allowed to take; it is no part of the affinity.
            session: the client's key for calls that share a growing context; None or "" if it gave none.
            context_len: tokens of the prompt that the base encodes (share/boundary.py).
            keys: those of the prompt's full pages.
            cached_pages: prefill worker -> how many leading pages of the prompt its prefix cache has; only the policy
                `prefix` asks, each worker at most once.

        Raises:
            PshareError: no worker takes the task.
        """
        able = _able(task, self._prefill_tasks, len(self.prefill_load))
        decoders = _able(task, self.decode_tasks, len(self.decode_load))
        if not able or not decoders:
            raise PshareError(f"No {'decode' if able else 'prefill'} worker takes the task {task!r}.")
        decode = min(decoders, key=self.decode_load.__getitem__)
        if self._policy == "prefix":
            known = cache(lambda worker: max(cached_pages(worker), self._coming(worker, keys)))
            prompt = _Prompt(context_len, self._page_size, keys, known)
            prefill = self._affinity.choose(able, session, prompt)
            return self._begin(Ticket(Route(prefill, decode), context_len, keys), prompt.uncached(prefill))
        prefill = self._next(able) if self._policy == "round_robin" else min(able, key=self.prefill_load.__getitem__)
        return self._begin(Ticket(Route(prefill, decode), context_len, ()), context_len)

    def take(self, route: Route, context_len: int) -> Ticket:
        """Counts a request on workers that the caller chose."""
        return self._begin(Ticket(route, context_len, ()), context_len)

    def prefilled(self, ticket: Ticket, tokens: int) -> None:
        """So many tokens, counted from the prompt's beginning, need no more work: cached, awaited from others or done.

        Fewer than before if work is lost. Ignored after the release: a worker's report may cross an abort.
        """
        if not ticket.released:
            self._owe(ticket, max(ticket.context_len - tokens, 0))

    def release(self, ticket: Ticket) -> None:
        """The request has ended. Only once (AssertionError)."""
        expect(not ticket.released, f"a request on {ticket.route} was released twice")
        ticket.released = True
        self._owe(ticket, 0)
        self.decode_load[ticket.route.decode] -= 1
        self._tickets[ticket.route.prefill].remove(ticket)

    def _begin(self, ticket: Ticket, tokens: int) -> Ticket:
        self._owe(ticket, tokens)
        self.decode_load[ticket.route.decode] += 1
        self._tickets[ticket.route.prefill].add(ticket)
        return ticket

    def _owe(self, ticket: Ticket, tokens: int) -> None:
        self.prefill_load[ticket.route.prefill] += tokens - ticket.outstanding
        ticket.outstanding = tokens

    def _next(self, able: tuple[int, ...]) -> int:
        self._turns[able] += 1
        return able[(self._turns[able] - 1) % len(able)]

    def _coming(self, worker: int, keys: Sequence[PageKey]) -> int:
        """How many leading pages unfinished requests will publish on a worker: equal prompts at one instant meet."""
        return max((_num_common(t.keys, keys) for t in self._tickets[worker] if t.outstanding), default=0)


@dataclass(frozen=True)
class _Prompt:
    """What a prompt would cost on each worker; `known` says how many leading pages are there or are coming."""

    context_len: int
    page_size: int
    keys: Sequence[PageKey]
    known: Callable[[int], int]

    def path(self, worker: int) -> Sequence[PageKey]:
        """The pages that the worker need not make."""
        num_pages = self.known(worker)
        expect(num_pages <= len(self.keys), f"{num_pages} pages of a prompt of {len(self.keys)} are cached")
        return self.keys[:num_pages]

    def uncached(self, worker: int) -> int:
        """The tokens that the worker would have to encode."""
        return self.context_len - self.page_size * len(self.path(worker))


class _Affinity:
    """The policy `prefix`: a prompt goes where its KV is, unless that worker is overloaded.

    A session key stays with its worker. A prompt without one, or the first of its session, goes to the worker that has
    most of it cached: a conversation stays where it is. But what is cached may be only what many share, and they must
    not all herd there: once as much work has come behind the very page where the cached part ends as copying that part
    costs, the prompt goes where tokens to encode + outstanding + recently assigned tokens are least. A conversation's
    cached part ends at a new page in each turn, so it is not driven away by the work of others.
    """

    def __init__(self, load: list[int]):
        self._load = load  # the router's, in tokens
        self._recent = [0.0] * len(load)
        self._sessions: OrderedDict[tuple[str, tuple[int, ...]], int] = OrderedDict()
        self._behind: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, able: tuple[int, ...], session: str | None, prompt: _Prompt) -> int:
        """The prefill worker, one of `able`; the prompt is counted as assigned to it."""
        # Workers that cannot take all tasks share no KV (each encodes with its own weights): a place in each group.
        home = self._sessions.get((session, able)) if session else None
        worker = self._first(able, prompt) if home is None else self._unless_overloaded(home, able, prompt)
        if session:
            _remember(self._sessions, (session, able), worker)
        self._count(worker, prompt)
        return worker

    def _first(self, able: tuple[int, ...], prompt: _Prompt) -> int:
        busy = {worker: self._load[worker] + self._recent[worker] for worker in able}
        warmest = min(able, key=lambda worker: (prompt.uncached(worker), busy[worker]))
        cheapest = min(able, key=lambda worker: prompt.uncached(worker) + busy[worker])
        path = prompt.path(warmest)
        behind = self._behind.get(path[-1].digest, 0) if path else 0
        copying = prompt.uncached(cheapest) - prompt.uncached(warmest)
        return cheapest if behind >= copying else self._unless_overloaded(warmest, able, prompt)

    def _unless_overloaded(self, home: int, able: tuple[int, ...], prompt: _Prompt) -> int:
        if self._load[home] == min(self._load[worker] for worker in able):
            return home
        wait = {worker: self._load[worker] + prompt.uncached(worker) for worker in able}
        quickest = min(able, key=lambda worker: (wait[worker], self._recent[worker]))
        return quickest if wait[home] > OVERLOAD * wait[quickest] + SLACK_TOKENS else home

    def _count(self, worker: int, prompt: _Prompt) -> None:
        tokens, path = prompt.uncached(worker), prompt.path(worker)
        self._recent = [recent * DECAY for recent in self._recent]
        self._recent[worker] += tokens
        for index, key in enumerate(path, 1):
            if index == len(path) or key.digest in self._behind:
                _remember(self._behind, key.digest, self._behind.get(key.digest, 0) + tokens)


def _able(task: str, tasks: Sequence[Collection[str]] | None, num_workers: int) -> tuple[int, ...]:
    return tuple(worker for worker in range(num_workers) if tasks is None or task in tasks[worker])


def _num_common(one: Sequence[PageKey], other: Sequence[PageKey]) -> int:
    """Length of the common prefix; keys are chained, so once they differ they never agree again."""
    return bisect_left(range(min(len(one), len(other))), True, key=lambda index: one[index] != other[index])


def _remember(table: OrderedDict[Any, int], key: Hashable, value: int) -> None:
    """Writes an entry, forgetting the least recently written one beyond the bound."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
