"""What a user asked for (`Request`) and its life in the engine (`Sequence`). Host-side, imports no jax.

The api makes requests; the engine wraps each in a sequence, and workers move it from state to state. Only the
transitions in `LEGAL` exist, and the three last states are final.
"""

import enum
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pshare_jax.engine.kv.keys import PageKey
from pshare_jax.engine.kv.pool import PageTable
from pshare_jax.engine.router import Ticket
from pshare_jax.engine.stop_strings import TextOutput
from pshare_jax.sampling.history import TokenHistory
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.share.boundary import base_len, next_position

FAILED = "The server failed while it worked on this request; its log says why."
ABORTED = "The server is stopping and has aborted this request."
TIMED_OUT = "The server made no progress on this request within its time limit and has given it up."


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it; `max_tokens` and the prompt together fit the model's context.

    `cache_salt` parts the prefix cache between tenants, `session` names a growing context for the router. `logprobs` is
    how many alternatives to report with each token's log-probability (0: its own alone), None reports nothing;
    `scores_prompt` reports the prompt's tokens too. From `response_start` on, the prompt is a begun answer: the base encodes
    what is before it but for one token, and the decode module goes on from its own KV of the rest.
    """

    id: str
    task: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    logprobs: int | None = None
    scores_prompt: bool = False
    response_start: int | None = None
    cache_salt: str = ""
    session: str | None = None

    @property
    def base_len(self) -> int:
        """Leading prompt tokens that the base encodes; the decode module consumes the others itself."""
        return base_len(len(self.prompt), self.response_start)

    @property
    def context(self) -> tuple[int, ...]:
        """The tokens that the base encodes."""
        return self.prompt[: self.base_len]

    @property
    def score_start(self) -> int:
        """The first prompt token that a scoring step consumes; from the last one on, decode steps do."""
        if self.response_start is not None:
            return self.base_len
        return 0 if self.scores_prompt else self.base_len


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability and the best alternatives, best first, as (id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, token_id: int, logprob: Any, top_ids: Any, top_logprobs: Any, wanted: int) -> "TokenLogprobs":
        """From numbers in NumPy: the log-probability, and the best tokens' `[num]`, of which `wanted` are told."""
        top = zip(top_ids[:wanted].tolist(), top_logprobs[:wanted].tolist(), strict=True)
        return cls(token_id, float(logprob), tuple(top))


@dataclass(frozen=True)
class Event:
    """What comes up after one token, or at the end.

    `text` is what may be shown now (often one token's text, possibly empty). The last event of a sequence has a
    `finish_reason` ("stop", "length", "abort") or an `error` sentence. `cached_tokens` counts the prompt's tokens that
    were not prefilled for this request. `prompt_logprobs`, one entry for each prompt token (None where there is no score),
    come once, before the first token, if they were asked for.
    """

    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    token_id: int | None = None

    @property
    def failure(self) -> str | None:
        """Why a client that still listens gets no answer: a sentence, or None."""
        return ABORTED if self.finish_reason == "abort" else self.error

    @property
    def last(self) -> bool:
        """Whether nothing follows this event."""
        return self.finish_reason is not None or self.error is not None


class State(enum.Enum):
    """Where a sequence is on its way.

    A waiting sequence holds nothing; a preempted one holds its private pages' content in host memory alone. Pages are
    held in the states between, and given back by the worker that has the sequence.
    """

    WAITING = "waiting"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


_ENDS = {State.ABORTED, State.FAILED}
LEGAL: dict[State, set[State]] = {
    State.WAITING: {State.PREFILLING} | _ENDS,
    # Back to where it was admitted from: what it waited for will not come, or its pages are lost.
    State.PREFILLING: {State.TRANSFERRING, State.WAITING, State.PREEMPTED} | _ENDS,
    State.TRANSFERRING: {State.DECODING, State.WAITING, State.PREEMPTED} | _ENDS,
    State.DECODING: {State.PREEMPTED, State.FINISHED} | _ENDS,
    State.PREEMPTED: {State.PREFILLING} | _ENDS,
    State.FINISHED: set(),
    State.ABORTED: set(),
    State.FAILED: set(),
}


class IllegalTransition(AssertionError):
    """A worker tried to move a sequence where its state does not lead: a bug, not a user's mistake."""


@dataclass(frozen=True)
class Saved:
    """The content of a preempted sequence's private pages in host memory, in parts of as many pages as move at once."""

    parts: list[Any]


_numbers = itertools.count()


@dataclass(eq=False)
class Sequence:
    """A request on its way: state, route, pages, and the text made so far.

    All fields are read and written under the engine's lock, except by the worker that has the sequence, which alone
    gives its pages back.
    """

    request: Request
    output: TextOutput
    history: TokenHistory
    keys: list[PageKey]
    on_event: Callable[[Event], None] = lambda event: None
    ticket: Ticket = field(init=False)
    """The router's record of it: its workers, and the work left for the prefill worker."""
    weights: Any = None
    """What it decodes with, from its submission to its end, even if its task changes meanwhile."""
    state: State = State.WAITING
    number: int = field(default_factory=lambda: next(_numbers))
    """Its age: sequences are served, and spared preemption, in the order of their coming."""
    completion_ids: list[int] = field(default_factory=list)
    prefill_pages: PageTable | None = None
    decode_pages: PageTable | None = None
    context_len: int = 0
    """Leading tokens whose KV must come from the base before it can decode."""
    num_prefilled: int = 0
    """Of these, how many the prefill pool holds."""
    num_sent: int = 0
    """Leading pages that the decode pool holds or that are on their way to it."""
    cached_tokens: int = 0
    counted: bool = False
    """Whether its prefix hits are in the cache's statistics."""
    opened: bool = False
    """Whether scoring steps have done what they have to before it generates."""
    num_scored: int = 0
    """How many of its prompt's tokens they have consumed."""
    scores: list[TokenLogprobs] = field(default_factory=list)
    last_turn: int = 0
    """The decode step that it took part in last."""
    must_restart: bool = False
    """Pages that it waited for will not be produced: it must release all its pages and be admitted anew."""
    saved: Saved | None = None
    progressed: float = field(default_factory=time.monotonic)
    came: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None

    def move(self, state: State) -> None:
        """Goes to `state`.

        Raises:
            IllegalTransition: there is no such way.
        """
        if state not in LEGAL[self.state]:
            raise IllegalTransition(f"request {self.request.id} cannot go from {self.state.value} to {state.value}")
        self.state = state
        self.progressed = time.monotonic()
        if state is State.PREFILLING and self.admitted is None:
            self.admitted = self.progressed

    @property
    def prefill_worker(self) -> int:
        """The index of its prefill worker."""
        return self.ticket.route.prefill

    @property
    def decode_worker(self) -> int:
        """The index of its decode worker."""
        return self.ticket.route.decode

    @property
    def final(self) -> bool:
        """Whether its life is over."""
        return not LEGAL[self.state]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far; the last one is not yet in the KV."""
        return len(self.request.prompt) + len(self.completion_ids)

    @property
    def next_position(self) -> int:
        """The position of the decode module's next input; the KV of all tokens before it is stored."""
        return next_position(self.num_tokens)

    @property
    def next_input(self) -> int:
        """The token that the decode module consumes next: the last prompt token, then its own."""
        return self.completion_ids[-1] if self.completion_ids else self.request.prompt[-1]

    def __post_init__(self) -> None:
        request = self.request
        self.opened = request.max_tokens > 0 and request.response_start is None and not request.scores_prompt

    @property
    def to_score(self) -> tuple[int, int]:
        """The prompt tokens that scoring steps have yet to consume, from the first to before the last: (start, end)."""
        return self.request.score_start + self.num_scored, next_position(len(self.request.prompt))

    def scored(self, num_tokens: int, scores: list[TokenLogprobs]) -> Event | None:
        """So many more tokens were consumed, with these scores of the tokens behind each; what is to be told, if anything."""
        self.num_scored += num_tokens
        self.scores += scores
        self.progressed = time.monotonic()
        start, end = self.to_score
        if start < end:
            return None
        self.opened = True
        told: tuple[TokenLogprobs | None, ...] = ()
        if self.request.scores_prompt:
            told = (*[None] * (len(self.request.prompt) - len(self.scores)), *self.scores)
        ends = None if self.request.max_tokens else "length"
        return Event("", 0, ends, None, self.cached_tokens, None, told) if told or ends else None

    def accept(self, token_id: int, logprobs: TokenLogprobs | None = None) -> Event:
        """Takes a sampled token: what may be shown, and why it ends if it does."""
        self.completion_ids.append(token_id)
        self.history.push(token_id)
        self.progressed = time.monotonic()
        if self.first_token is None:
            self.first_token = self.progressed
        text, reason = self._text(token_id)
        return Event(text, len(self.completion_ids), reason, None, self.cached_tokens, logprobs, token_id=token_id)

    def _text(self, token_id: int) -> tuple[str, str | None]:
        if token_id in self.request.stop_ids:
            return self.output.finish(), "stop"
        text = self.output.push(token_id)
        if self.output.stopped:
            return text, "stop"
        if len(self.completion_ids) < self.request.max_tokens:
            return text, None
        text += self.output.finish()
        return text, "stop" if self.output.stopped else "length"
