"""Chooses the workers of a request: the decode worker by task and load, the prefill worker by policy.

The engine reports every request's start, prefill progress and end, and workers that die and return, under its lock. Load
is outstanding work, running or queued, never cached pages.
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
Kind = Literal["prefill", "decode"]

MAX_REMEMBERED = 65_536  # sessions, and as many ends of cached prefixes
OVERLOAD = 2  # affinity may cost this many times what the quickest worker takes,
SLACK_TOKENS = 512  # and about one prefill step more, since a shorter queue hardly delays
HELD_REQUESTS = 4  # a decode worker with all of a prompt's pages counts as so many requests less busy
DECAY = 0.5 ** (1 / 64)  # the weight of assigned work halves every 64 requests


@dataclass(frozen=True)
class Route:
    """The prefill worker and the decode worker of a request, by index."""

    prefill: int
    decode: int


@dataclass(eq=False, slots=True)
class Ticket:
    """A request on its workers, and the tokens that its prefill worker still has to encode for it."""

    route: Route
    context_len: int
    keys: Sequence[PageKey]
    outstanding: int = 0
    released: bool = False


class Router:
    """Tracks the load of all workers and chooses the workers of each request.

    `prefix` chooses the prefill worker that has the prompt's KV (see `_Affinity`), `round_robin` the next, and
    `least_loaded` the worker with the fewest outstanding tokens; the last two ignore sessions and caches. Decode load
    counts requests: a decode step costs by its rows, and the length of an answer is unknown. Ties go to the first worker.
    With `prefix`, pages in its pool make a decode worker less busy: they need not be sent, nor encoded again where the
    prefill pool has lost them.
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
        self._left_out: dict[Kind, set[int]] = {"prefill": set(), "decode": set()}
        self._removed: dict[Kind, set[int]] = {"prefill": set(), "decode": set()}
        self._policy = policy
        self._page_size = page_size
        self._prefill_tasks = prefill_tasks
        self._turns: Counter[tuple[int, ...]] = Counter()
        self._coming: list[Counter[bytes]] = [Counter() for _ in range(num_prefill)]
        """By prefill worker, how many unfinished requests will publish a page there, by the digest of its key."""
        self._affinity = _Affinity(self.prefill_load, page_size)

    def assign(
        self,
        task: str,
        session: Hashable,
        context_len: int,
        keys: Sequence[PageKey],
        cached_pages: Callable[[int], int],
        decode_pages: Callable[[int], int] = lambda worker: 0,
        parent: Hashable = None,
    ) -> Ticket:
        """Chooses the workers of a request and adds it to their load.

        Args:
            task: both workers must serve it; it does not affect the affinity.
            session: the name of calls that share a growing context, a tie-break; None or "" without a session.
            context_len: tokens of the prompt that the base encodes (share/boundary.py).
            keys: the keys of the prompt's full pages.
            cached_pages: the number of the prompt's leading pages in the prefix cache of a prefill worker; the policy
                `prefix` calls it, at most once per worker.
            decode_pages: the same for a decode worker.
            parent: the session that has called this one; its worker breaks ties for a session without a worker.

        Raises:
            PshareError: no worker serves the task.
        """
        able = self._alive("prefill", _able(task, self._prefill_tasks, len(self.prefill_load)))
        decoders = self._alive("decode", _able(task, self.decode_tasks, len(self.decode_load)))
        if not able or not decoders:
            raise PshareError(f"No {'decode' if able else 'prefill'} worker serves the task {task!r}.")
        decode = min(decoders, key=self.decode_load.__getitem__)
        if self._policy == "prefix":
            worth = HELD_REQUESTS * self._page_size / max(context_len, 1)
            decode = min(decoders, key=lambda worker: self.decode_load[worker] - worth * decode_pages(worker))
            known = cache(lambda worker: max(cached_pages(worker), self._pending(worker, keys)))
            prompt = _Prompt(context_len, self._page_size, keys, known)
            prefill = self._affinity.choose(able, session, prompt, parent)
            return self._begin(Ticket(Route(prefill, decode), context_len, keys), prompt.uncached(prefill))
        prefill = self._next(able) if self._policy == "round_robin" else min(able, key=self.prefill_load.__getitem__)
        return self._begin(Ticket(Route(prefill, decode), context_len, ()), context_len)

    def take(self, route: Route, context_len: int) -> Ticket:
        """Adds a request to the load of workers that the caller chose."""
        return self._begin(Ticket(route, context_len, ()), context_len)

    def prefilled(self, ticket: Ticket, tokens: int) -> None:
        """The prompt's first `tokens` need no more work: they are cached, done, or awaited from other requests.

        The number shrinks if work is lost. Reports after the release are ignored: they may cross an abort.
        """
        if not ticket.released:
            self._set_outstanding(ticket, max(ticket.context_len - tokens, 0))

    def release(self, ticket: Ticket) -> None:
        """The request has ended; a second call raises AssertionError."""
        expect(not ticket.released, f"a request on {ticket.route} was released twice")
        ticket.released = True
        self._set_outstanding(ticket, 0)
        self.decode_load[ticket.route.decode] -= 1

    def leave_out(self, kind: Kind, index: int) -> None:
        """The worker is dead: `assign` avoids it until `bring_back`. Its requests count until each is released.

        Where every worker that serves a task is left out, `assign` chooses among them as if they were alive: the engine
        restarts them.
        """
        self._left_out[kind].add(index)

    def bring_back(self, kind: Kind, index: int) -> None:
        """The worker is alive again."""
        self._left_out[kind].discard(index)

    def remove(self, kind: Kind, index: int) -> None:
        """The worker is dead for good: `assign` never chooses it again."""
        self._removed[kind].add(index)

    def all_routes(self) -> list[tuple[Route, str]]:
        """Routes, each with a task, that together use all prefill workers and every task of every decode worker."""
        pairs = [(decode, task) for decode, tasks in enumerate(self.decode_tasks) for task in tasks]
        routes = []
        for turn in range(max(len(pairs), len(self.prefill_load))):
            decode, task = pairs[turn % len(pairs)]
            able = _able(task, self._prefill_tasks, len(self.prefill_load))
            routes.append((Route(able[turn % len(able)], decode), task))
        return routes

    def _alive(self, kind: Kind, able: tuple[int, ...]) -> tuple[int, ...]:
        able = tuple(worker for worker in able if worker not in self._removed[kind])
        return tuple(worker for worker in able if worker not in self._left_out[kind]) or able

    def _begin(self, ticket: Ticket, tokens: int) -> Ticket:
        self._set_outstanding(ticket, tokens)
        self.decode_load[ticket.route.decode] += 1
        return ticket

    def _set_outstanding(self, ticket: Ticket, tokens: int) -> None:
        self.prefill_load[ticket.route.prefill] += tokens - ticket.outstanding
        before, ticket.outstanding = ticket.outstanding, tokens
        coming = self._coming[ticket.route.prefill]
        if tokens and not before:
            coming.update([key.digest for key in ticket.keys])
        elif before and not tokens:
            for key in ticket.keys:
                coming[key.digest] -= 1
                if not coming[key.digest]:
                    del coming[key.digest]

    def _next(self, able: tuple[int, ...]) -> int:
        self._turns[able] += 1
        return able[(self._turns[able] - 1) % len(able)]

    def _pending(self, worker: int, keys: Sequence[PageKey]) -> int:
        """The leading pages that unfinished requests will publish on a worker: simultaneous equal prompts meet there."""
        coming = self._coming[worker]
        # Keys are chained: a request that will publish a page will publish all pages before it.
        return bisect_left(keys, True, key=lambda key: key.digest not in coming)


@dataclass(frozen=True)
class _Prompt:
    """What a prompt would cost on each worker; `known(worker)` is its number of leading pages cached or pending there."""

    context_len: int
    page_size: int
    keys: Sequence[PageKey]
    known: Callable[[int], int]

    def path(self, worker: int) -> Sequence[PageKey]:
        """The keys of the pages that the worker need not compute."""
        return self.keys[: self._num_known(worker)]

    def uncached(self, worker: int) -> int:
        """The tokens that the worker would have to encode."""
        return self.context_len - self.page_size * self._num_known(worker)

    def _num_known(self, worker: int) -> int:
        num_pages = self.known(worker)
        expect(num_pages <= len(self.keys), f"{num_pages} pages of a prompt of {len(self.keys)} are cached")
        return num_pages


class _Affinity:
    """The policy `prefix`: a prompt goes where its KV is, unless that worker is overloaded.

    So a conversation stays with its KV, with or without a session. But the cached part may be a prefix that many prompts
    share, and they must not all crowd on one worker: once the work assigned behind the last cached page equals the cost
    of encoding the cached part elsewhere, the prompt goes where tokens to encode + outstanding + recently assigned tokens
    are least. A conversation's cached part ends at a new page in each turn, so other prompts do not drive it away.

    A session breaks ties: its last worker, or in its first call that of its parent, counts as one page less busy. It weighs
    no more, since the caches are known exactly, and a client may give all its conversations one key.
    """

    def __init__(self, load: list[int], page_size: int):
        self._load = load  # the router's, in tokens
        self._page_size = page_size
        self._recent = [0.0] * len(load)
        self._sessions: OrderedDict[Hashable, int] = OrderedDict()
        self._behind: OrderedDict[bytes, int] = OrderedDict()

    def choose(self, able: tuple[int, ...], session: Hashable, prompt: _Prompt, parent: Hashable = None) -> int:
        """The prefill worker, from `able`; the prompt is counted as assigned to it."""
        homes = [self._sessions[name] for name in (session, parent) if name and name in self._sessions]
        worker = self._best(able, homes[0] if homes else None, prompt)
        if session:
            _remember(self._sessions, session, worker)
        self._count(worker, prompt)
        return worker

    def _best(self, able: tuple[int, ...], home: int | None, prompt: _Prompt) -> int:
        wait = {worker: self._load[worker] + prompt.uncached(worker) for worker in able}
        recent = {worker: self._recent[worker] - self._page_size * (worker == home) for worker in able}
        warmest = min(able, key=lambda worker: (prompt.uncached(worker), self._load[worker] + recent[worker]))
        cheapest = min(able, key=lambda worker: wait[worker] + recent[worker])
        quickest = min(able, key=lambda worker: (wait[worker], recent[worker]))
        path = prompt.path(warmest)
        behind = self._behind.get(path[-1].digest, 0) if path else 0
        if behind >= prompt.uncached(cheapest) - prompt.uncached(warmest):
            return cheapest
        return quickest if wait[warmest] > OVERLOAD * wait[quickest] + SLACK_TOKENS else warmest

    def _count(self, worker: int, prompt: _Prompt) -> None:
        tokens, path = prompt.uncached(worker), prompt.path(worker)
        self._recent = [recent * DECAY for recent in self._recent]
        self._recent[worker] += tokens
        for index, key in enumerate(path, 1):
            if index == len(path) or key.digest in self._behind:
                _remember(self._behind, key.digest, self._behind.get(key.digest, 0) + tokens)


def _able(task: str, tasks: Sequence[Collection[str]] | None, num_workers: int) -> tuple[int, ...]:
    return tuple(worker for worker in range(num_workers) if tasks is None or task in tasks[worker])


def _remember(table: OrderedDict[Any, int], key: Hashable, value: int) -> None:
    """Writes an entry and drops the least recently written entry beyond the bound."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
