"""A checked body against what model and server allow: its prompts become the engine's requests, or one sentence of refusal.

The api calls it with the body of protocol.py and the prompts in tokens. Imports no jax.
"""

import secrets
from dataclasses import dataclass

from pshare_jax.engine.request import Request
from pshare_jax.errors import PshareError
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.server.openai.schema import ApiError, Body, ChatBody, CompletionBody
from pshare_jax.share.boundary import base_len

MAX_SCORES = 1_000_000
"""Log-probabilities of prompt tokens that a call may ask for; each takes about 100 bytes until it is answered."""


@dataclass(frozen=True)
class Limits:
    """What model and server allow: context length, vocabulary size, the ids that end an answer, answers a call."""

    max_len: int
    vocab_size: int
    stop_ids: frozenset[int]
    max_answers: int = 256


def make_requests(
    body: Body, request_id: str, prompts: list[list[int]], limits: Limits, session: str | None = None
) -> list[Request]:
    """The engine's requests for a body whose prompts have been tokenised: `n` for each prompt, in the answer's order.

    Raises:
        ApiError: 400, a prompt is empty, has ids outside the vocabulary or does not fit the context; or a field does not
            fit the vocabulary, the other fields or the server.
    """
    seed = secrets.randbits(63) if body.seed is None else body.seed
    sampling = [_sampling(body, seed, choice, limits.vocab_size) for choice in range(body.n)]
    stop_ids = frozenset(body.stop_token_ids) | (frozenset() if body.ignore_eos else limits.stop_ids)
    requests = []
    text = body if isinstance(body, CompletionBody) else None
    starts = [None] * len(prompts) if text is None else text.response_starts(len(prompts))
    _check_scores(text, prompts)
    for prompt, start in zip(prompts, starts, strict=True):
        ids = tuple(prompt)
        max_tokens = _check_length(body, prompt, limits)
        _check_start(start, len(prompt))
        for one in sampling:
            requests.append(
                Request(
                    id=f"{request_id}-{len(requests)}",
                    task=body.model,
                    prompt=ids,
                    max_tokens=max_tokens,
                    sampling=one,
                    stop=tuple(body.stop),
                    stop_ids=stop_ids,
                    min_tokens=body.min_tokens,
                    logprobs=body.num_logprobs,
                    scores_prompt=text is not None and text.echo and text.logprobs is not None,
                    response_start=start,
                    cache_salt=body.cache_salt or "",
                    session=session or body.prompt_cache_key or body.user,
                )
            )
    return requests


def check_num_answers(body: Body, limits: Limits) -> None:
    """Refuses (ApiError 400) more answers than a call may have, before anything is done for them."""
    num_prompts = len(body.prompts) if isinstance(body, CompletionBody) else 1
    if (asked := num_prompts * body.n) > limits.max_answers:
        param = "prompt" if body.n == 1 else "n"
        message = f"{param} asks for {asked} answers; this server takes at most {limits.max_answers} a call."
        raise ApiError(400, message, param=param)


def _sampling(body: Body, seed: int, choice: int, vocab_size: int) -> SamplingParams:
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
    try:
        sampling.check_vocabulary(vocab_size)
    except PshareError as error:
        raise ApiError(400, str(error), param="logit_bias") from None
    return sampling


def _check_length(body: Body, prompt: list[int], limits: Limits) -> int:
    """The prompt's `max_tokens`."""
    param = "messages" if isinstance(body, ChatBody) else "prompt"
    if not prompt:
        raise ApiError(400, f"{param} holds no tokens; a prompt needs at least one.", param=param)
    if max(prompt) >= limits.vocab_size or min(prompt) < 0:
        raise ApiError(400, f"{param} holds a token id outside 0 to {limits.vocab_size - 1}.", param=param)
    max_tokens = _max_tokens(body, len(prompt), limits.max_len, param)
    if body.min_tokens > max_tokens:
        message = f"min_tokens is {body.min_tokens}, but an answer may have {max_tokens} tokens at most here."
        raise ApiError(400, message, param="min_tokens")
    return max_tokens


def _check_start(start: int | None, prompt_len: int) -> None:
    try:
        base_len(prompt_len, start)
    except PshareError as error:
        raise ApiError(400, str(error), param="response_start") from None


def _check_scores(body: CompletionBody | None, prompts: list[list[int]]) -> None:
    if body is None or not body.echo or body.logprobs is None:
        return
    if (asked := body.n * (1 + body.logprobs) * sum(map(len, prompts))) > MAX_SCORES:
        message = (
            f"logprobs with echo asks for {asked} log-probabilities of prompt tokens; a call may have {MAX_SCORES}."
        )
        raise ApiError(400, message, param="logprobs")


def _max_tokens(body: Body, prompt_len: int, max_len: int, param: str) -> int:
    asked, other = body.max_completion_tokens, body.max_tokens
    if asked is not None and other is not None and asked != other:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; send one.", param="max_completion_tokens")
    wanted = other if asked is None else asked
    limit = f"This model's maximum context length is {max_len} tokens. However, "
    code = "context_length_exceeded"
    if prompt_len >= max_len:
        raise ApiError(
            400,
            f"{limit}your {param} resulted in {prompt_len} tokens, which leaves no room for an answer. "
            f"Please reduce the length of the {param}.",
            param=param,
            code=code,
        )
    if wanted is not None and prompt_len + wanted > max_len:
        raise ApiError(
            400,
            f"{limit}you requested {prompt_len + wanted} tokens ({prompt_len} in the {param}, {wanted} in the "
            f"completion). Please reduce the length of the {param} or completion.",
            param=param,
            code=code,
        )
    return max_len - prompt_len if wanted is None else wanted
