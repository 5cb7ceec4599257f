"""What clients may send: request bodies, their checks, and the error object for everything else. Imports no jax.

The api hands raw bytes to `parse_body`, gets a checked body, tokenises the prompts and calls `make_requests`. A wrong
type is refused by field name, null means absent, unknown fields are accepted, and a known field that would change the
output and is not offered yet is refused by name.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from pshare_jax.boundary import base_len
from pshare_jax.errors import PshareError
from pshare_jax.sampling_params import NUM_TOP, SamplingParams
from pshare_jax.serving.fields import (
    check_choice,
    check_logit_bias,
    check_messages,
    check_neutral,
    check_prompt,
    check_stop,
    check_stream_options,
)
from pshare_jax.serving.request import Request

MAX_DEPTH = 100
MAX_SCORES = 1_000_000
"""Log-probabilities of prompt tokens that a call may ask for; each takes about 100 bytes until it is answered."""


class ApiError(Exception):
    """An answer that is an error: HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.error = {"message": message, "type": kind, "param": param, "code": code}


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "user", "assistant", "tool"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART_SCHEMA}]},
        },
        "required": ["role", "content"],
    },
}
"""What /openapi.json says of messages (templates take more: an assistant's tool_calls, and what they know beside)."""


class Fields(BaseModel):
    """A body whose nulls are absent fields and whose special fields are checked first."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _normalised(cls, data: dict[str, Any]) -> dict[str, Any]:
        check_neutral(data, cls.model_fields)
        data = {name: value for name, value in data.items() if value is not None}
        for name, check in cls.checks().items():
            if name in data:
                data[name] = check(data[name])
        return data

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """Fields with a form of their own: name -> function that returns the plain form or raises ValueError."""
        return {}


class _Body(Fields):
    """Fields that both endpoints take."""

    model: str
    stream: bool = False
    stream_options: dict[str, Any] = {}
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[str] = []
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    ignore_eos: bool = False
    user: str | None = None
    cache_salt: str | None = None
    prompt_cache_key: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] = 1
    min_tokens: Annotated[int, Field(ge=0)] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: dict[int, float] = {}

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The checks that both endpoints have."""
        return {"stop": check_stop, "stream_options": check_stream_options, "logit_bias": check_logit_bias}

    @model_validator(mode="after")
    def _asks_for_something(self) -> "_Body":
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0 and not getattr(self, "echo", False):
                raise ValueError(f"{name} must be at least 1; 0 is for completions with echo.")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options.get("include_usage"))

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.include_usage and bool(self.stream_options.get("continuous_usage_stats"))


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], WithJsonSchema(MESSAGES_SCHEMA)]
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["none", "auto"] = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=NUM_TOP)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true.")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token's log-probability, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The shared checks and those of messages and tool_choice."""
        return {**super().checks(), "messages": check_messages, "tool_choice": check_choice}


class CompletionBody(_Body):
    """POST /v1/completions: `prompt` is text or token ids, or a list of one of the two.

    `echo` with `logprobs` scores the prompt; `response_start` says from which token on a prompt is a begun answer, one
    number or one for each prompt (design.md, invariant 4).
    """

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=NUM_TOP)] | None = None
    echo: bool = False
    response_start: int | list[int] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts."""
        value = self.prompt
        several = isinstance(value, list) and value and not isinstance(value[0], int)
        return list(value) if several else [value]  # pyright: ignore[reportReturnType]

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token's log-probability, None for no log-probabilities."""
        return self.logprobs

    def response_starts(self, num_prompts: int) -> list[int | None]:
        """One for each prompt."""
        starts = self.response_start
        return [*starts] if isinstance(starts, list) else [starts] * num_prompts

    @model_validator(mode="after")
    def _agrees(self) -> "CompletionBody":
        starts, prompts = self.response_start, self.prompts
        if isinstance(starts, list) and len(starts) != len(prompts):
            raise ValueError(f"response_start has {len(starts)} numbers for {len(prompts)} prompts.")
        return self

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The shared checks and the prompt's."""
        return {**super().checks(), "prompt": check_prompt}


Body = ChatBody | CompletionBody
B = TypeVar("B", bound=Fields)


@dataclass(frozen=True)
class Limits:
    """What model and server allow: context length, vocabulary size, the ids that end an answer, answers a call."""

    max_len: int
    vocab_size: int
    stop_ids: frozenset[int]
    max_answers: int = 256


def parse_body(kind: type[B], raw: bytes) -> B:
    """JSON bytes -> a checked body.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"The request body is not valid JSON: {reason}.") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The request body must be a JSON object.")
    _check_tree(data)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _invalid(error) from None


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


def check_model(name: str, tasks: list[str]) -> None:
    """Raises ApiError 404 unless `name` is exactly a served task."""
    if name not in tasks:
        raise unknown_model(name, tasks)


def unknown_model(name: str, tasks: list[str]) -> ApiError:
    """The answer for a model that is not served."""
    known = ", ".join(repr(task) for task in tasks) or "no task at the moment"
    message = f"The model {name!r} does not exist; this server has {known}."
    return ApiError(404, message, param="model", code="model_not_found")


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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_tree(data: Any) -> None:
    """Refuses half characters (lone surrogates, which no encoder takes) and nesting that templates would choke on."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        if not level:
            return
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += [*node.keys(), *node.values()]
            elif isinstance(node, list):
                below += node
            elif isinstance(node, str) and not node.isascii():
                _check_text(node)
        level = below
    raise ApiError(400, f"The request body is nested deeper than {MAX_DEPTH} levels.")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "The request body holds half a character (a lone surrogate escape).") from None


def _invalid(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "value_error":
        message: str = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        param = message.split(" ", 1)[0].split(".", 1)[0]
        return ApiError(400, message, param=param)
    name = ".".join(str(part) for part in first["loc"])
    param = str(first["loc"][0]) if first["loc"] else None
    return ApiError(400, f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}.", param=param)


def error_body(error: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's error answer."""
    return {"error": dict(error)}


def body_schema(kind: type[Fields], tasks: Sequence[str] = ()) -> dict[str, Any]:
    """A body's schema for /openapi.json (handlers read bodies themselves, so FastAPI does not know them).

    `tasks` are the values that its field `model` takes, if there are any.
    """
    schema = kind.model_json_schema()
    if tasks:
        schema["properties"]["model"]["enum"] = list(tasks)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
