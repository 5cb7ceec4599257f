"""What a user asked for (`Request`) and its life in the engine (`Sequence`). Host-side, imports no jax.

The api makes requests; the engine wraps each in a sequence, and workers move it from state to state. Only the
transitions in `LEGAL` exist, and the three last states are final.
"""

import enum
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pshare_jax.serving.output import TextOutput

FAILED = "The server failed while it worked on this request; its log says why."
ABORTED = "The server is stopping and has aborted this request."


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it; `max_tokens` and the prompt together fit the model's context."""

    id: str
    task: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Event:
    """What comes up after one token, or at the end.

    `text` is what may be shown now (often one token's text, possibly empty). The last event of a sequence has a
    `finish_reason` ("stop", "length", "abort") or an `error` sentence.
    """

    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def failure(self) -> str | None:
        """Why a client that still listens gets no answer: a sentence, or None."""
        return ABORTED if self.finish_reason == "abort" else self.error

    @property
    def last(self) -> bool:
        """Whether nothing follows this event."""
        return self.finish_reason is not None or self.error is not None


class State(enum.Enum):
    """Where a sequence is on its way."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


_ENDS = {State.ABORTED, State.FAILED}
LEGAL: dict[State, set[State]] = {
    State.WAITING: {State.PREFILLING} | _ENDS,
    State.PREFILLING: {State.TRANSFERRING} | _ENDS,
    State.TRANSFERRING: {State.DECODING} | _ENDS,
    State.DECODING: {State.FINISHED} | _ENDS,
    State.FINISHED: set(),
    State.ABORTED: set(),
    State.FAILED: set(),
}


class IllegalTransition(AssertionError):
    """A worker tried to move a sequence where its state does not lead: a bug, not a user's mistake."""


@dataclass(eq=False)
class Sequence:
    """A request on its way: state, route, KV while it holds some, and the text made so far.

    One worker owns it at a time; `abort_requested` may be set from any thread and is read by the owner.
    """

    request: Request
    output: TextOutput
    on_event: Callable[[Event], None]
    prefill_worker: int = 0
    decode_worker: int = 0
    state: State = State.WAITING
    abort_requested: threading.Event = field(default_factory=threading.Event)
    num_prefilled: int = 0
    completion_ids: list[int] = field(default_factory=list)
    kv: Any = None
    entered: dict[State, float] = field(default_factory=lambda: {State.WAITING: time.monotonic()})

    def move(self, state: State) -> None:
        """Goes to `state`, dropping the KV in a final one.

        Raises:
            IllegalTransition: there is no such way.
        """
        if state not in LEGAL[self.state]:
            raise IllegalTransition(f"request {self.request.id} cannot go from {self.state.value} to {state.value}")
        self.state = state
        self.entered[state] = time.monotonic()
        if self.final:
            self.kv = None

    @property
    def final(self) -> bool:
        """Whether its life is over."""
        return not LEGAL[self.state]

    def accept(self, token_id: int) -> Event:
        """Takes a sampled token: what may be shown, and why it ends if it does."""
        self.completion_ids.append(token_id)
        count, request = len(self.completion_ids), self.request
        if token_id in request.stop_ids:
            return Event(self.output.finish(), count, "stop")
        text = self.output.push(token_id)
        if self.output.stopped:
            return Event(text, count, "stop")
        if count < request.max_tokens:
            return Event(text, count)
        text += self.output.finish()
        return Event(text, count, "stop" if self.output.stopped else "length")


End = Callable[[Sequence, State, Event], None]
"""How a worker hands back a sequence whose life is over: its final state and the last event for the client."""
