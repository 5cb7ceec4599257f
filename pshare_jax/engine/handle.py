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
        """With `on_event` the events go to it, and the handle yields none."""
        self.sequence = sequence
        self._advance, self._cancel = advance, cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._seen: list[Event] = []
        sequence.on_event = on_event or self._events.put

    def __iter__(self) -> Iterator[Event]:
        """The events that no iteration has yielded yet."""
        while not (self._seen and self._seen[-1].last):
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                self._advance()
                continue
            self._seen.append(event)
            yield event

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
    handles: list[Handle] = []
    num_reported = 0

    def report() -> None:
        nonlocal num_reported
        while progress is not None and num_reported < sum(handle.done for handle in handles):
            num_reported += 1
            progress(num_reported)

    try:
        for request in requests:
            check_request(request, engine.facts.vocab_size, engine.facts.max_len)
            while engine.num_live >= engine.config.limits.max_requests:
                advance()
            handles.append(engine.submit(request))
            report()
        results = []
        for handle in handles:
            results.append(handle.result())
            report()
        return results
    finally:
        for handle in handles:
            handle.cancel()
