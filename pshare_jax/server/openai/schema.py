"""Request bodies, their checks, and OpenAI's error object.

Handlers get a checked body from bytes by `parse_body` (json_body.py); to_requests.py checks it against the limits of model and
server. A wrong type is refused by field name, null means absent, unknown fields are ignored, and unsupported fields that
would change the output are refused by name.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from pshare_jax.sampling.params import NUM_TOP
from pshare_jax.server.openai.agent_hint import AgentHint
from pshare_jax.server.openai.fields import (
    check_logit_bias,
    check_messages,
    check_neutral,
    check_prompt,
    check_stop,
    check_stream_options,
    continues,
)
from pshare_jax.server.openai.tools import (
    CHOICE_SCHEMA,
    FUNCTION_CALL_SCHEMA,
    FUNCTIONS_SCHEMA,
    TOOLS_SCHEMA,
    CallRules,
    call_rules,
    check_function_call,
    check_functions,
    check_tool_choice,
    check_tools,
    modern_tools,
)


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


class CallBody(RequestBody):
    """A body that asks for an answer."""

    model: str
    stream: bool = False

    @property
    @abstractmethod
    def generation(self) -> "Body":
        """The answer that is asked for, as a chat or completion."""

    def renamed(self, error: "ApiError") -> "ApiError":
        """An error of `generation` in the words of this body."""
        return error


class _GenerationBody(CallBody):
    """Fields that both endpoints support."""

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
    agent_hint: Annotated[AgentHint | None, WithJsonSchema(AgentHint.model_json_schema())] = None
    response_format: dict[str, Any] = {}
    structured_outputs: dict[str, Any] = {}
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The checks of both endpoints."""
        return {"stop": check_stop, "stream_options": check_stream_options, "logit_bias": check_logit_bias}

    @model_validator(mode="after")
    def _generates_or_scores(self) -> "_GenerationBody":
        for name in ("max_tokens", "max_completion_tokens"):
            if getattr(self, name) == 0 and not getattr(self, "echo", False) and not self.prefetches:
                raise ValueError(f"{name} must be at least 1; 0 is allowed only with echo in /v1/completions.")
        return self

    @property
    def generation(self) -> "Body":
        """The body itself."""
        assert isinstance(self, Body)
        return self

    @property
    def prefetches(self) -> bool:
        """Whether it asks for no answer, only for the prompt's KV."""
        return self.agent_hint is not None and self.agent_hint.prefetch

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
    tools: Annotated[list[dict[str, Any]], WithJsonSchema(TOOLS_SCHEMA)] = []
    tool_choice: Annotated[str, WithJsonSchema(CHOICE_SCHEMA)] = "auto"
    parallel_tool_calls: bool = True
    functions: Annotated[list[dict[str, Any]], WithJsonSchema(FUNCTIONS_SCHEMA)] = []
    function_call: Annotated[str, WithJsonSchema(FUNCTION_CALL_SCHEMA)] = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=NUM_TOP)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs to be true.")
        # Both raise if the fields contradict each other.
        _ = self.call_rules, self.continues
        return self

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last message."""
        return continues(self.messages, self.continue_final_message, sent_true(self, "add_generation_prompt"))

    @property
    def prompt_tools(self) -> list[dict[str, Any]]:
        """The functions that the prompt lists, whatever `tool_choice` is: so calls of an agent share their context."""
        return self.tools or modern_tools(self.functions)

    @cached_property
    def call_rules(self) -> CallRules | None:
        """What the answer may call, None for nothing."""
        return call_rules(self.tools, self.tool_choice, self.parallel_tool_calls, self.functions, self.function_call)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report with each token's log-probability, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The shared checks and those of messages and tools."""
        return {
            **super().checks(),
            "messages": check_messages,
            "tools": check_tools,
            "tool_choice": check_tool_choice,
            "functions": check_functions,
            "function_call": check_function_call,
        }


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


def sent_true(body: RequestBody, name: str) -> bool:
    """Whether the client has set a field of booleans, which may be true by default."""
    return name in body.model_fields_set and bool(getattr(body, name))


Body = ChatBody | CompletionBody


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


def error_body(error: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's error response."""
    return {"error": dict(error)}


def body_schema(kind: type[RequestBody], tasks: Sequence[str] = ()) -> dict[str, Any]:
    """A body's schema for /openapi.json; `tasks`, if any, are the allowed values of `model`."""
    schema = kind.model_json_schema()
    if tasks:
        schema["properties"]["model"]["enum"] = list(tasks)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
