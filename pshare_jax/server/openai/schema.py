"""Request bodies, their checks, and OpenAI's error object.

Handlers pass raw bytes to `parse_body` and get a checked body, which to_requests.py checks against the limits of model and
server. A wrong type is refused by field name, null means absent, unknown fields are ignored, and unsupported fields that
would change the output are refused by name.
"""

import gc
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from pshare_jax.sampling.params import NUM_TOP
from pshare_jax.server.openai.fields import (
    check_logit_bias,
    check_messages,
    check_neutral,
    check_prompt,
    check_stop,
    check_stream_options,
    check_tool_choice,
)

MAX_DEPTH = 100
MAX_CONTAINERS = 1_000_000
"""Objects and lists in a body. Making five million keeps the interpreter's lock for half a second."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class ApiError(Exception):
    """An error response: HTTP status and OpenAI's error object.

    `retry`: whether the same request may succeed later (True) or will fail again (False); None leaves it to the status.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry: bool | None = None,
    ):
        super().__init__(message)
        self.status, self.retry = status, retry
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
"""The schema of messages in /openapi.json (templates accept more, such as an assistant's tool_calls)."""


class RequestBody(BaseModel):
    """Base of all bodies: null fields are dropped, and fields with a check of their own are checked first."""

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
        """Field name -> function that returns the normal form or raises ValueError."""
        return {}


class _GenerationBody(RequestBody):
    """Fields that both endpoints support."""

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
        """The checks of both endpoints."""
        return {"stop": check_stop, "stream_options": check_stream_options, "logit_bias": check_logit_bias}

    @model_validator(mode="after")
    def _generates_or_scores(self) -> "_GenerationBody":
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0 and not getattr(self, "echo", False):
                raise ValueError(f"{name} must be at least 1; 0 is allowed only with echo in /v1/completions.")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options.get("include_usage"))

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream carries the usage so far."""
        return self.include_usage and bool(self.stream_options.get("continuous_usage_stats"))


class ChatBody(_GenerationBody):
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
            raise ValueError("top_logprobs requires logprobs to be true.")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token's log-probability, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The shared checks and those of messages and tool_choice."""
        return {**super().checks(), "messages": check_messages, "tool_choice": check_tool_choice}


class CompletionBody(_GenerationBody):
    """POST /v1/completions: `prompt` is a string, token ids, or a list of either.

    `echo` with `logprobs` scores the prompt; `response_start` is the index of the prompt's first response token, one number
    for all prompts or one per prompt.
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
        """The response start of each prompt."""
        starts = self.response_start
        return [*starts] if isinstance(starts, list) else [starts] * num_prompts

    @model_validator(mode="after")
    def _agrees(self) -> "CompletionBody":
        starts, prompts = self.response_start, self.prompts
        if isinstance(starts, list) and len(starts) != len(prompts):
            raise ValueError(
                f"response_start has {len(starts)} entries for {len(prompts)} prompts; send one per prompt."
            )
        return self

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The shared checks and the prompt's."""
        return {**super().checks(), "prompt": check_prompt}


Body = ChatBody | CompletionBody
B = TypeVar("B", bound=RequestBody)


def parse_body(kind: type[B], raw: bytes) -> B:
    """Parses and checks a JSON body.

    Raises:
        ApiError: 400, naming the field.
    """
    if _num_containers(raw) > MAX_CONTAINERS:
        raise ApiError(400, f"The request body has more than {MAX_CONTAINERS:,} objects and lists; send fewer.")
    try:
        with _no_collections():
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


def check_model(name: str, tasks: list[str]) -> None:
    """Raises ApiError 404 unless `name` is a served task."""
    if name not in tasks:
        raise unknown_model(name, tasks)


def unknown_model(name: str, tasks: list[str]) -> ApiError:
    """The error for a model that is not served."""
    message = f"The model {name!r} does not exist; available models: {', '.join(map(repr, tasks)) or 'none'}."
    return ApiError(404, message, param="model", code="model_not_found")


def unavailable() -> ApiError:
    """The error while the engine accepts nothing."""
    message = "The server accepts no requests: it is stopping or a worker has failed; see /health and the server's log."
    return ApiError(503, message, kind="server_error", code="unavailable", retry=True)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Pauses the garbage collector, which would search millions of new objects again and again (1.2 s of 1.4 s for 8 MB of
    brackets) while the call keeps the interpreter's lock.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Not by a thread that found it paused: the other thread ends the pause.
        if paused:
            gc.enable()


def _num_containers(raw: bytes) -> int:
    """At most this many objects and lists are in a body; exact if there are more than `MAX_CONTAINERS`."""
    num = raw.count(b"[") + raw.count(b"{")
    if num <= MAX_CONTAINERS:
        return num
    bare = _STRING.sub(b"", raw)
    return bare.count(b"[") + bare.count(b"{")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_tree(data: Any) -> None:
    """Refuses lone surrogates, which cannot be encoded, and nesting deeper than templates can render."""
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
    raise ApiError(400, f"The request body is nested too deeply; at most {MAX_DEPTH} levels are allowed.")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "The request body contains a lone surrogate escape; send valid Unicode.") from None


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
    """OpenAI's error response."""
    return {"error": dict(error)}


def body_schema(kind: type[RequestBody], tasks: Sequence[str] = ()) -> dict[str, Any]:
    """A body's schema for /openapi.json; `tasks`, if any, are the allowed values of `model`."""
    schema = kind.model_json_schema()
    if tasks:
        schema["properties"]["model"]["enum"] = list(tasks)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
