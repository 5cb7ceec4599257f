"""A user's `Request` and the `Event`s with which the engine answers it."""

import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.text.grammar import Grammar

FAILED = "The server failed while it worked on this request; its log says why."
ABORTED = "The server is stopping and has aborted this request."
TIMED_OUT = "The server made no progress on this request within its time limit and has given it up."


MAX_PIN_SECONDS = 86_400


@dataclass(frozen=True)
class Hint:
    """What an agent says of its session (`Request.session`) besides the prompt; the answer does not depend on it.

    `parent` is the session that has called this one: its pages count as this session's. The pages of the prompt, and of
    the parent's, are evicted last for `pin_seconds` after the request has ended (0 ends an earlier pin, None leaves it).
    `evict` ends the session with the request: pages that only this session has used are evicted first. With `prefetch` the
    prompt's full pages are computed and nothing is generated.
    """

    parent: str | None = None
    pin_seconds: int | float | None = None
    evict: bool = False
    prefetch: bool = False


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it; prompt and `max_tokens` together must fit the model's context.

    `cache_salt` separates tenants in the prefix cache, `session` names a growing context for the router and the `hint`.
    `logprobs` is the number of alternatives reported with each token's log-probability (0: the token alone; None: no
    report), and `scores_prompt` reports the prompt's tokens too. From `response_start` on, the prompt is a begun answer: the base
    encodes the tokens before it except the last (share/boundary.py), and the decode module continues from its own KV of the
    rest. The whole answer, with what is begun, follows `grammar`; it ends ("stop") as soon as nothing may follow, and its stop
    ids are allowed only where it may end.
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
    grammar: Grammar | None = None
    cache_salt: str = ""
    session: str | None = None
    hint: Hint | None = None

    @property
    def parent(self) -> str | None:
        """The session that has called this one's."""
        return None if self.hint is None else self.hint.parent

    @property
    def prefetches(self) -> bool:
        """Whether it only computes the prompt's pages, for later requests."""
        return self.hint is not None and self.hint.prefetch


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's log-probability and the best alternatives, best first, as (id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, token_id: int, logprob: Any, top_ids: Any, top_logprobs: Any, wanted: int) -> "TokenLogprobs":
        """From NumPy numbers: the log-probability, and the best tokens' `[num]`, of which `wanted` are reported."""
        top = zip(top_ids[:wanted].tolist(), top_logprobs[:wanted].tolist(), strict=True)
        return cls(token_id, float(logprob), tuple(top))


@dataclass(frozen=True)
class Event:
    """The engine's report after a token, or at the end.

    `text` may be shown now (often one token's text, possibly empty). A request's last event has a `finish_reason`
    ("stop", "length", "abort") or an `error` sentence. `cached_tokens` counts the prompt tokens that were not prefilled
    for this request. `prompt_logprobs`, with an entry for each prompt token (None without a score), are reported once,
    before the first token, if requested. `retry` says of an error whether the same request may succeed later (True), will
    fail again (False), or neither (None).
    """

    text: str = ""
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    token_id: int | None = None
    retry: bool | None = None

    @property
    def failure(self) -> str | None:
        """A sentence for the client about why it gets no answer, or None."""
        return ABORTED if self.finish_reason == "abort" else self.error

    @property
    def last(self) -> bool:
        """Whether this is the request's last event."""
        return self.finish_reason is not None or self.error is not None


def check_request(request: Request, vocab_size: int, max_len: int) -> None:
    """Checks that the model can answer the request.

    Raises:
        PshareError: the prompt is empty, has unknown ids, or is too long together with `max_tokens`; or the hint does not
            fit the request.
    """
    prompt = request.prompt
    if not prompt:
        raise PshareError("The prompt is empty; it needs at least one token.")
    if request.max_tokens < 0:
        raise PshareError(f"max_tokens must be at least 0, not {request.max_tokens}.")
    # Also an answer of no token needs a place behind the prompt: its last token is consumed.
    if len(prompt) + max(request.max_tokens, 1) > max_len:
        raise PshareError(
            f"The context length is at most {max_len} tokens, but the prompt has {len(prompt)} and max_tokens is "
            f"{request.max_tokens}; shorten the prompt or lower max_tokens."
        )
    if has_unknown_ids(prompt, vocab_size):
        raise PshareError(f"Token ids must be 0 to {vocab_size - 1}.")
    check_hint(request)


def has_unknown_ids(prompt: Sequence[int], vocab_size: int) -> bool:
    """Whether a prompt of at least one token has ids outside the vocabulary."""
    try:
        ids = np.frombuffer(array.array("q", prompt), np.int64)
    except OverflowError:
        return True
    return bool(ids.min() < 0 or ids.max() >= vocab_size)


def check_hint(request: Request) -> None:
    """Checks that a request's hint, if it has one, fits it.

    Raises:
        PshareError: the sentence begins with the wrong field's name.
    """
    hint = request.hint
    if hint is None:
        return
    if hint.pin_seconds is not None and not 0 <= hint.pin_seconds <= MAX_PIN_SECONDS:
        raise PshareError(f"pin_seconds must be a number from 0 to {MAX_PIN_SECONDS}, not {hint.pin_seconds}.")
    if not request.session:
        for name in ("pin_seconds", "evict"):
            if getattr(hint, name):
                raise PshareError(f"{name} needs a session; name it.")
    if hint.prefetch and request.scores_prompt:
        raise PshareError("prefetch computes no log-probabilities of the prompt; omit one of them.")
