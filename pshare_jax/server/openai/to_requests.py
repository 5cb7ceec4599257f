"""Turns a checked body (schema.py) and its tokenised prompts into engine requests, within the limits of model and server."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pshare_jax.engine.request import Request, check_hint, has_unknown_ids
from pshare_jax.errors import PshareError
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.server.openai.schema import ApiError, Body, ChatBody, CompletionBody
from pshare_jax.share.boundary import base_len
from pshare_jax.text.grammar import Grammar

DEFAULT_TOKENS = 16
"""Completion tokens of /v1/completions without max_tokens, as in OpenAI's API; a chat may fill the context."""
MAX_SCORES = 1_000_000
"""The most prompt logprobs of a call; each takes about 100 bytes until the response is sent."""


class Prompt(NamedTuple):
    """A prompt's ids, and the index of the first that belongs to a begun answer."""

    ids: list[int]
    response_start: int | None = None


@dataclass(frozen=True)
class Limits:
    """The limits of model and server: context length, vocabulary size, end-of-sequence ids, choices per call."""

    max_len: int
    vocab_size: int
    stop_ids: frozenset[int]
    max_choices: int


def make_requests(
    body: Body,
    request_id: str,
    prompts: Sequence[Prompt],
    limits: Limits,
    session: str | None = None,
    grammar: Grammar | None = None,
) -> list[Request]:
    """The engine requests of a body: `n` for each tokenised prompt, in the order of the response's choices, all with the
    grammar.

    `session` is the name that the call's headers give to its session; it goes before those of the body.

    Raises:
        ApiError: 400, a prompt is empty, has ids outside the vocabulary or exceeds the context; or a field contradicts the
            vocabulary, another field or a limit.
    """
    seed = secrets.randbits(63) if body.seed is None else body.seed
    sampling = [_sampling(body, seed, choice, limits.vocab_size) for choice in range(body.n)]
    stop_ids = frozenset(body.stop_token_ids) | (frozenset() if body.ignore_eos else limits.stop_ids)
    requests = []
    text = body if isinstance(body, CompletionBody) else None
    _check_scores(text, prompts)
    named, hint = (None, None) if body.agent_hint is None else (body.agent_hint.session, body.agent_hint.hint)
    for prompt, start in prompts:
        ids = tuple(prompt)
        max_tokens = _check_length(body, prompt, limits)
        _check_start(start, len(prompt))
        for params in sampling:
            requests.append(
                Request(
                    id=f"{request_id}-{len(requests)}",
                    task=body.model,
                    prompt=ids,
                    max_tokens=max_tokens,
                    sampling=params,
                    stop=tuple(body.stop),
                    stop_ids=stop_ids,
                    min_tokens=body.min_tokens,
                    logprobs=body.num_logprobs,
                    scores_prompt=text is not None and text.echo and text.logprobs is not None,
                    response_start=start,
                    grammar=grammar,
                    cache_salt=body.cache_salt or "",
                    session=session or named or body.prompt_cache_key or body.user,
                    hint=hint,
                )
            )
    for request in requests[:1]:
        _check_hint(request)
    return requests


def check_num_choices(body: Body, limits: Limits) -> None:
    """Raises ApiError 400 for more choices than a call may have."""
    num_prompts = len(body.prompts) if isinstance(body, CompletionBody) else 1
    if (requested := num_prompts * body.n) > limits.max_choices:
        param = "prompt" if body.n == 1 else "n"
        message = f"{param} requests {requested} choices; this server allows at most {limits.max_choices} per call."
        raise ApiError(400, message, param=param)


def _sampling(body: Body, seed: int, choice: int, vocab_size: int) -> SamplingParams:
    try:
        sampling = SamplingParams(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            seed=seed,
            choice=choice,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=tuple(body.logit_bias.items()),
        )
        sampling.check_vocabulary(vocab_size)
    except PshareError as error:
        raise ApiError(400, str(error), param="logit_bias") from None
    return sampling


def _check_length(body: Body, prompt: list[int], limits: Limits) -> int:
    """The prompt's `max_tokens`."""
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    if not prompt:
        raise ApiError(400, f"{param} contains no tokens; a prompt needs at least one.", param=param)
    if has_unknown_ids(prompt, limits.vocab_size):
        raise ApiError(400, f"{param} contains a token id outside 0 to {limits.vocab_size - 1}.", param=param)
    max_tokens = _max_tokens(body, len(prompt), limits.max_len, param)
    if body.min_tokens > max_tokens and not body.prefetches:
        message = f"min_tokens is {body.min_tokens}, but the completion may have at most {max_tokens} tokens."
        raise ApiError(400, message, param="min_tokens")
    return max_tokens


def _check_hint(request: Request) -> None:
    try:
        check_hint(request)
    except PshareError as error:
        raise ApiError(400, f"agent_hint.{error}", param="agent_hint") from None


def _check_start(start: int | None, prompt_len: int) -> None:
    try:
        base_len(prompt_len, start)
    except PshareError as error:
        raise ApiError(400, str(error), param="response_start") from None


def _check_scores(body: CompletionBody | None, prompts: Sequence[Prompt]) -> None:
    if body is None or not body.echo or body.logprobs is None:
        return
    if (requested := body.n * (1 + body.logprobs) * sum(len(prompt.ids) for prompt in prompts)) > MAX_SCORES:
        message = f"logprobs with echo requests {requested} prompt logprobs; a call may have at most {MAX_SCORES}."
        raise ApiError(400, message, param="logprobs")


def _max_tokens(body: Body, prompt_len: int, max_len: int, param: str) -> int:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        message = "max_completion_tokens and max_tokens differ; send only one of them."
        raise ApiError(400, message, param="max_completion_tokens")
    requested = old if new is None else new
    if prompt_len >= max_len:
        raise too_long(str(prompt_len), max_len, param)
    room = max_len - prompt_len
    if requested is None:
        return room if isinstance(body, ChatBody) else min(room, max(DEFAULT_TOKENS, body.min_tokens))
    if requested > room:
        parts = f"{prompt_len} in the {param}, {requested} in the completion"
        raise _exceeds(f"you requested {prompt_len + requested} tokens ({parts})", max_len, param)
    return requested


def too_long(prompt_len: str, max_len: int, param: str) -> ApiError:
    """The error for a prompt that fills the context, `prompt_len` says how long it is."""
    return _exceeds(
        f"your {param} resulted in {prompt_len} tokens, which leaves no room for a completion", max_len, param
    )


def _exceeds(detail: str, max_len: int, param: str) -> ApiError:
    # Clients recognise the first words of OpenAI's message.
    message = f"This model's maximum context length is {max_len} tokens. However, {detail}. Please reduce the length."
    return ApiError(400, message, param=param, code="context_length_exceeded")
