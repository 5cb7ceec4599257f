"""What clients may send: request bodies, their checks, and the error object for everything else. Imports no jax.

The api hands raw bytes to `parse_body` and gets a checked body, which limits.py holds against the model and the server. A
wrong type is refused by field name, null means absent, unknown fields are accepted, and a known field that would change the
output and is not offered yet is refused by name.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from pshare_jax.sampling.params import NUM_TOP
from pshare_jax.server.openai.fields import (
    check_choice,
    check_logit_bias,
    check_messages,
    check_neutral,
    check_prompt,
    check_stop,
    check_stream_options,
)

MAX_DEPTH = 100


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
    number or one for each prompt.
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


def check_model(name: str, tasks: list[str]) -> None:
    """Raises ApiError 404 unless `name` is exactly a served task."""
    if name not in tasks:
        raise unknown_model(name, tasks)


def unknown_model(name: str, tasks: list[str]) -> ApiError:
    """The answer for a model that is not served."""
    known = ", ".join(repr(task) for task in tasks) or "no task at the moment"
    message = f"The model {name!r} does not exist; this server has {known}."
    return ApiError(404, message, param="model", code="model_not_found")


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
