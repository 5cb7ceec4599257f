"""A request's life in the engine: its state, and its progress in prefill and decode.

The engine wraps each request in a `Sequence`, and workers move it from state to state. Only the transitions in `LEGAL`
exist; the last three states are final.
"""

import enum
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pshare_jax.engine.kv.keys import PageKey
from pshare_jax.engine.kv.pool import PageTable
from pshare_jax.engine.kv.sessions import NOBODY, Caller
from pshare_jax.engine.request import Event, Request, TokenLogprobs
from pshare_jax.engine.router import Ticket
from pshare_jax.share.boundary import Split, next_position
from pshare_jax.text.grammar import TokenMatcher
from pshare_jax.text.stop_strings import TextOutput


class State(enum.Enum):
    """The stage of a sequence.

    A waiting sequence holds nothing, and a preempted sequence only a copy of its private pages in host memory. In the
    states between it holds pages, which its worker releases, or, for an older sequence, the worker that needs them
    (kv/ledger.py: `put_aside`).
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
    # It must restart if pages that it waited for will not be produced, or if its pages are lost.
    State.PREFILLING: {State.TRANSFERRING, State.WAITING, State.PREEMPTED} | _ENDS,
    # A prefetch ends without decoding.
    State.TRANSFERRING: {State.DECODING, State.FINISHED, State.WAITING, State.PREEMPTED} | _ENDS,
    # After a failed step its pages are lost, but not the tokens that it has generated.
    State.DECODING: {State.PREEMPTED, State.FINISHED, State.WAITING} | _ENDS,
    State.PREEMPTED: {State.PREFILLING} | _ENDS,
    State.FINISHED: set(),
    State.ABORTED: set(),
    State.FAILED: set(),
}
# Not a set: a state's hash takes longer than three comparisons.
_FINAL = tuple(state for state, ways in LEGAL.items() if not ways)


class IllegalTransition(AssertionError):
    """A transition that `LEGAL` does not have: a bug, not a user's mistake."""


@dataclass(frozen=True)
class Saved:
    """The content of a preempted sequence's private pages in host memory, in parts of at most one transfer's pages."""

    parts: list[Any]


@dataclass
class PrefillProgress:
    """The base's KV that a sequence has, since its last admission."""

    table: PageTable | None = None
    """Its pages in the prefill pool, or, if both workers share one pool, its decode pages."""
    context_len: int = 0
    """Leading tokens whose KV must come from the base before the sequence can decode."""
    num_prefilled: int = 0
    """The number of these tokens that the prefill pool holds."""
    num_sent: int = 0
    """Leading pages that are in the decode pool or in flight to it."""
    returning: "list[PageTransfer]" = field(default_factory=list)
    """Pages that only the decode pool has, on their way to the prefill pool: the base continues behind them."""

    @property
    def num_left(self) -> int:
        """Tokens left to encode, without those whose KV comes back from the decode pool."""
        first = self.num_prefilled
        if self.returning:
            first = self.returning[-1].last * self.returning[-1].target.pool.page_size
        return max(self.context_len - first, 0)

    @property
    def done(self) -> bool:
        """Whether nothing is left to prefill."""
        return self.num_prefilled >= self.context_len


@dataclass
class DecodeProgress:
    """The progress of a sequence in its decode module: scored and generated tokens, and the pages of their KV."""

    module: Any = None
    """The decode module of its task, from submission to end, even if the task changes meanwhile."""
    table: PageTable | None = None
    """Its pages in the decode pool."""
    saved: Saved | None = None
    """The content of its private pages, from its preemption until it decodes again."""
    completion_ids: list[int] = field(default_factory=list)
    opened: bool = False
    """Whether all scoring steps that must precede generation are done."""
    num_scored: int = 0
    """Tokens that scoring steps have consumed since its last admission."""
    scores: list[TokenLogprobs] = field(default_factory=list)
    reported: bool = False
    """Whether the prompt's scores are reported: scoring steps then only recompute lost KV, of generated tokens too."""
    has_row: bool = False
    """Whether it is one of the sequences that share the steps of its group; others wait for a row."""
    finishing: bool = False
    """Whether its last token is being generated: it needs no row any more."""
    last_turn: int = 0
    """The last decode turn that it took part in, or, before its first, the turn in which it joined."""


PREFETCH_DELAY = 64
"""A prefetch is as old as a request that arrives so many requests later: nobody waits for it, but it is not put off forever."""
_numbers = itertools.count(step=2)


@dataclass(eq=False)
class Sequence:
    """A request in the engine. All fields are read and written under the engine's lock, except by the worker that has it."""

    request: Request
    output: TextOutput
    keys: list[PageKey]
    split: Split
    """Where its module's boundary divides the prompt."""
    on_event: Callable[[Event], None] = lambda event: None
    matcher: TokenMatcher | None = None
    """Where its answer is in its grammar, if it has one."""
    caller: Caller = NOBODY
    """Whose pages it uses: the names of its session and that one's parent."""
    ticket: Ticket = field(init=False)
    """The router's record: its workers, and the work left for the prefill worker."""
    state: State = State.WAITING
    number: int = field(default_factory=lambda: next(_numbers))
    """Its age: older sequences, those with lower numbers, are served first and preempted last."""
    prefill: PrefillProgress = field(default_factory=PrefillProgress)
    decode: DecodeProgress = field(default_factory=DecodeProgress)
    cached_tokens: int = 0
    """Prompt tokens that were not prefilled for it, counted at its first admission."""
    must_restart: bool = False
    """Its pages are lost or needed by an older sequence, or pages that it waited for will not be produced: it must release
    all its pages and be admitted anew."""
    suspect: tuple[str, int] | None = None
    """The kind of step that failed with it, and where it was: it runs such steps alone until it is beyond (failures.py)."""
    num_accused: int = 0
    """How often it has failed alone where a step on padding did not, since it became a suspect."""
    failed_transfers: list[PageTable] = field(default_factory=list)
    """The pages whose transfers have failed since it last decoded: those whose pool was rebuilt since failed with a step."""
    num_failed_writes: int = 0
    """The transfers that could not be written since then."""
    progressed: float = field(default_factory=time.monotonic)
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    first_token: float | None = None

    def move(self, state: State) -> None:
        """Changes the state.

        Raises:
            IllegalTransition: `LEGAL` has no such transition.
        """
        if state not in LEGAL[self.state]:
            raise IllegalTransition(f"request {self.request.id} cannot go from {self.state.value} to {state.value}")
        self.state = state
        self.progressed = time.monotonic()
        if state is State.DECODING:
            self.num_failed_writes, self.failed_transfers = 0, []
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
    def group(self) -> int:
        """Names the steps that it shares with others: those of its weights' group, or 0 while it has tokens to score."""
        return id(self._weights.group) if self.decode.opened else 0

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.state in _FINAL

    @property
    def weights(self) -> Any:
        """The weights of its group's next step, as they are now."""
        return self._weights.current

    @property
    def slot(self) -> int:
        """The slot of its adapter in that step."""
        return self._weights.slot

    @property
    def scoring_group(self) -> tuple[int, bool]:
        """Names the scoring steps that it shares with others: those of one group in which tokens are alike `independent`."""
        return id(self._weights.group), self.to_score[0] < self.split.base_len

    @property
    def _weights(self) -> Any:
        """Its module's, or the base's where an activated LoRA does not act."""
        module = self.decode.module
        acts = self.split.active and (self.decode.opened or self.to_score[0] >= self.split.base_len)
        return module if acts else module.base or module

    @property
    def leaving(self) -> bool:
        """Whether it has ended or must restart, so that its pages are about to be released."""
        return self.final or self.must_restart

    @property
    def tables(self) -> list[PageTable]:
        """Its page tables, in one or two pools."""
        return [held for held in (self.prefill.table, self.decode.table) if held is not None]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far; the last token is not yet in the KV."""
        return len(self.request.prompt) + len(self.decode.completion_ids)

    @property
    def next_position(self) -> int:
        """The position of the decode module's next input; the KV of all tokens before it is stored."""
        return next_position(self.num_tokens)

    @property
    def next_input(self) -> int:
        """The token that the decode module consumes next: the last prompt token, then its own tokens."""
        return self.decode.completion_ids[-1] if self.decode.completion_ids else self.request.prompt[-1]

    def __post_init__(self) -> None:
        request = self.request
        ready = self.split.base_len == next_position(len(request.prompt)) and request.response_start is None
        self.decode.opened = request.max_tokens > 0 and ready and not request.scores_prompt
        if request.prefetches:
            # Odd, so that no two sequences have the same age.
            self.number += 2 * PREFETCH_DELAY + 1

    def prefetched(self) -> Event:
        """The last event of a prefetch: its pages are in both pools."""
        self.progressed = time.monotonic()
        return Event(finish_reason="stop", cached_tokens=self.cached_tokens)

    def lose_kv(self) -> None:
        """Its KV is gone: the base will encode its context again, and scoring steps all that the decode module consumed."""
        decode = self.decode
        decode.num_scored, decode.has_row = 0, False
        if decode.opened:
            decode.reported = True
            start, end = self.to_score
            decode.opened = start >= end
        elif not decode.reported:
            decode.scores = []

    @property
    def to_score(self) -> tuple[int, int]:
        """The tokens that scoring steps have yet to consume, from the first to before the last: (start, end).

        Tokens before the boundary are consumed for their scores alone; the last token is left to decode steps.
        """
        request, base_len = self.request, self.split.base_len
        whole = request.scores_prompt and request.response_start is None and not self.decode.reported
        start = (0 if whole else base_len) + self.decode.num_scored
        return start, base_len if start < base_len else next_position(self.num_tokens)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens `start` to `end` of prompt and answer."""
        num_prompt = len(self.request.prompt)
        generated = self.decode.completion_ids[max(start - num_prompt, 0) : max(end - num_prompt, 0)]
        return (*self.request.prompt[start:end], *generated)

    def scored(self, num_tokens: int, scores: list[TokenLogprobs]) -> Event | None:
        """Records a step that consumed `num_tokens` tokens and scored the token after each; returns an event, if any."""
        self.decode.num_scored += num_tokens
        self.decode.scores += scores
        self.progressed = time.monotonic()
        start, end = self.to_score
        if start < end:
            return None
        self.decode.opened, self.decode.has_row = True, False
        if self.decode.reported:
            return None
        self.decode.reported = True
        reported: tuple[TokenLogprobs | None, ...] = ()
        if self.request.scores_prompt:
            # Of a begun answer only its own tokens are reported, though an activated LoRA reads more.
            first, scored = self.request.response_start or 1, len(self.decode.scores)
            own = self.decode.scores[first + scored - len(self.request.prompt) :]
            reported = (*[None] * (len(self.request.prompt) - len(own)), *own)
        ends = None if self.request.max_tokens else "length"
        return Event("", 0, ends, None, self.cached_tokens, None, reported) if reported or ends else None

    def accept(self, token_id: int, logprobs: TokenLogprobs | None = None) -> Event:
        """Appends a sampled token; the event has the text to show and, if the sequence ends, the reason."""
        self.decode.completion_ids.append(token_id)
        if self.matcher is not None and token_id not in self.request.stop_ids:
            self.matcher.push(token_id)
        self.progressed = time.monotonic()
        if self.first_token is None:
            self.first_token = self.progressed
        text, reason = self._text(token_id)
        return Event(
            text, len(self.decode.completion_ids), reason, None, self.cached_tokens, logprobs, token_id=token_id
        )

    def _text(self, token_id: int) -> tuple[str, str | None]:
        if token_id in self.request.stop_ids:
            return self.output.finish(), "stop"
        text = self.output.push(token_id, may_stop=len(self.decode.completion_ids) > self.request.min_tokens)
        if self.output.stopped:
            return text, "stop"
        finished = self.matcher is not None and self.matcher.finished
        if not finished and len(self.decode.completion_ids) < self.request.max_tokens:
            return text, None
        text += self.output.finish()
        return text, "stop" if finished or self.output.stopped else "length"


@dataclass(eq=False)
class PageTransfer:
    """KV in flight between two pools: entries `first` to `last` of a sequence's page table, from its
    prefill pages into its decode pages.

    The source pages are held until the transfer is written or has failed. When its sequence ends while other
    sequences wait for these pages, the transfer adopts the table up to them (`adopted`) and continues; without waiters it
    is `cancelled` and dropped unwritten, so that nothing is ever written into released pages.
    """

    sequence: Sequence
    source: PageTable
    target: PageTable
    first: int
    last: int
    source_pages: list[int] = field(init=False)
    decode_worker: int = field(init=False)
    adopted: list[int] | None = None
    cancelled: bool = False
    content: Any = None
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Keeps the source's page ids and the decode worker, since the sequence's may change."""
        self.source_pages = self.source.pages[self.first : self.last]
        self.decode_worker = self.sequence.decode_worker

    @property
    def target_pages(self) -> list[int]:
        """The pages that the content is written into."""
        return (self.adopted or self.target.pages)[self.first : self.last]

    @property
    def needed_by_sequence(self) -> bool:
        """Whether its own sequence still needs it."""
        return self.adopted is None and not self.cancelled

    @property
    def orphaned(self) -> bool:
        """Whether the sequences for which it was kept have ended too."""
        return self.adopted is not None and not self.target.manager.has_waiters(self.target_pages)
