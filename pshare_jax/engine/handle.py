"""The handle of a submitted request, with which its caller iterates events, waits for the result, or cancels."""

import queue
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pshare_jax.engine.request import Event, Request, TokenLogprobs, check_request
from pshare_jax.engine.sequence import Sequence
from pshare_jax.errors import PshareError

if TYPE_CHECKING:
    from pshare_jax.engine.engine import Engine


class EngineFull(PshareError):
    """As many requests as `limits.max_requests` are waiting or running."""


class RequestFailed(PshareError):
    """A request has ended with an error."""


@dataclass(frozen=True)
class Result:
    """A whole answer. `ids` include the end token if it was generated; `finish_reason` is "stop", "length" or "abort".

    `cached_tokens` counts prompt tokens that were not prefilled for this request. If requested, `logprobs` has an entry
    for each id, and `prompt_logprobs` for each prompt token.
    """

    request: Request
    ids: list[int]
    text: str
    finish_reason: str
    cached_tokens: int
    logprobs: list[TokenLogprobs]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]


class Handle:
    """Iterating yields the request's events until the last; `result` waits for the whole answer.

    Without the engine's threads (`Engine.start` was not called) waiting steps the engine in the calling thread.
    """

    def __init__(
        self,
        sequence: Sequence,
        advance: Callable[[], None],
        cancel: Callable[[str], None],
        on_event: Callable[[Event], None] | None = None,
    ):
        """With `on_event` the events go to it, and the handle has neither events nor a result."""
        self.sequence = sequence
        self._advance, self._cancel = advance, cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._has_events = on_event is None
        self._seen: list[Event] = []
        sequence.on_event = on_event or self._events.put

    def __iter__(self) -> Iterator[Event]:
        """The events that no iteration has yielded yet."""
        if not self._has_events:
            raise ValueError("the events of this handle go to its on_event")
        while not (self._seen and self._seen[-1].last):
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                self._advance()
                continue
            self._seen.append(event)
            yield event

    @property
    def admitted(self) -> bool:
        """Whether the request has left the queue at least once."""
        return self.sequence.admitted is not None

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self.sequence.final

    def cancel(self) -> None:
        """Ends the request at once; its last event has the finish reason "abort"."""
        self._cancel(self.sequence.request.id)

    def result(self) -> Result:
        """The whole answer, once the request has ended.

        Raises:
            RequestFailed: the request has failed.
        """
        for _ in self:
            pass
        last = self._seen[-1]
        if last.error is not None:
            raise RequestFailed(last.error)
        return Result(
            self.sequence.request,
            [event.token_id for event in self._seen if event.token_id is not None],
            "".join(event.text for event in self._seen),
            last.finish_reason or "abort",
            last.cached_tokens,
            [event.logprobs for event in self._seen if event.logprobs is not None],
            next((event.prompt_logprobs for event in self._seen if event.prompt_logprobs), ()),
        )


def run_all(
    engine: "Engine", requests: Iterable[Request], advance: Callable[[], None], progress: Callable[[int], None] | None
) -> list[Result]:
    """`Engine.run`; `advance` waits for the engine."""
    requests = list(requests)
    for request in requests:
        check_request(request, engine.facts.vocab_size, engine.facts.max_len)
    results: dict[int, Result] = {}
    running: dict[int, Handle] = {}

    def wait() -> None:
        """Takes the results of ended requests and drops their handles; if there are none, waits for the engine."""
        ended = [index for index, handle in running.items() if handle.done]
        if not ended:
            advance()
        for index in ended:
            results[index] = running[index].result()
            del running[index]
            if progress is not None:
                progress(len(results))

    try:
        for index, request in enumerate(requests):
            while index not in running:
                try:
                    running[index] = engine.submit(request)
                except EngineFull:
                    wait()
        while running:
            wait()
    finally:
        for handle in running.values():
            handle.cancel()
        if running:
            # The workers release the pages of cancelled requests in their next step.
            advance()
    return [results[index] for index in range(len(requests))]
