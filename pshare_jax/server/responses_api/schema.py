"""The body of POST /v1/responses, and the chat that answers it.

Fields that a chat has too are passed on to it, so that both endpoints have one set of names, types and limits for them.
"""

from typing import Annotated, Any

from pydantic import (
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from pshare_jax.sampling.params import NUM_TOP
from pshare_jax.server.openai.json_body import invalid
from pshare_jax.server.openai.json_bytes import dump
from pshare_jax.server.openai.schema import ApiError, CallBody, ChatBody
from pshare_jax.server.responses_api.to_chat import (
    chat_format,
    chat_tool,
    chat_tool_choice,
    function_tools,
    messages_of,
    text_format,
    tool_choice,
)

LOGPROBS = "message.output_text.logprobs"
STATELESS = "this server stores no responses; omit it and send all items of the conversation as input."
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "store": ((False,), STATELESS),
    "previous_response_id": ((), STATELESS),
    "conversation": ((), STATELESS),
    "background": ((False,), "this server answers while the client waits; omit it."),
    "prompt": ((), "this server has no stored prompts; send instructions and input."),
    "context_management": (([],), "omit it and shorten the input."),
    "moderation": ((), "omit it."),
    "n": ((1,), "a response has one answer; omit it."),
    "messages": ((), "send input."),
    "max_tokens": ((), "send max_output_tokens."),
    "max_completion_tokens": ((), "send max_output_tokens."),
    "response_format": ((), "send text.format."),
    "functions": (([],), "send tools."),
    "function_call": (("none", "auto"), "send tool_choice."),
    "logprobs": ((False,), f"send include with {LOGPROBS!r}."),
}
"""Fields that would change the answer, each with the values that do not and what to do instead."""
CHAT_WORDS = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
}
"""Fields of a chat that have another name here."""

_ITEM_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"enum": ["message", "function_call", "function_call_output", "reasoning"]},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
        "call_id": {"type": "string"},
        "name": {"type": "string"},
        "arguments": {"type": "string"},
        "output": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    },
}
_INPUT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _ITEM_SCHEMA}]}
_CHOICE_SCHEMA = {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}]}


def _with_chat_fields(schema: dict[str, Any]) -> None:
    """Adds the fields that are passed on to the schema."""
    chat = ChatBody.model_json_schema()
    passed = {name: field for name, field in chat["properties"].items() if name not in NOT_PASSED}
    schema["properties"] = {**passed, **schema["properties"]}
    if "$defs" in chat:
        schema["$defs"] = {**chat["$defs"], **schema.get("$defs", {})}


class ResponsesBody(CallBody):
    """POST /v1/responses; the annotated types are normal forms, and `input` has become messages."""

    model_config = ConfigDict(json_schema_extra=_with_chat_fields)

    input: Annotated[list[dict[str, Any]], WithJsonSchema(_INPUT_SCHEMA)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] = Field([])
    tool_choice: Annotated[str | dict[str, Any], WithJsonSchema(_CHOICE_SCHEMA)] = "auto"
    parallel_tool_calls: bool = True
    text: dict[str, Any] = Field({"format": {"type": "text"}})
    include: list[str] = Field([])
    top_logprobs: Annotated[int, Field(ge=0, le=NUM_TOP)] = 0
    metadata: dict[str, str] = Field({})
    user: str | None = None
    safety_identifier: str | None = None

    _chat: ChatBody = PrivateAttr()
    _echo: dict[str, Any] = PrivateAttr()
    _echo_bytes: int = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _with_chat(cls, data: dict[str, Any], handler: ModelWrapValidatorHandler["ResponsesBody"]) -> "ResponsesBody":
        _check_refused(data)
        body = handler({name: value for name, value in data.items() if name in cls.model_fields})
        passed = {name: value for name, value in data.items() if name not in NOT_PASSED}
        try:
            chat = ChatBody.model_validate({**passed, **body._chat_fields()})
        except ValidationError as error:
            raise body.renamed(invalid(error)) from None
        body._chat, body._echo = chat, body._echoed(chat)
        body._echo_bytes = len(dump(body._echo))
        return body

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The checks of fields with several forms."""
        return {"input": messages_of, "tools": function_tools, "tool_choice": tool_choice, "text": text_format}

    @property
    def generation(self) -> ChatBody:
        """The chat whose answer is the response's output."""
        return self._chat

    @property
    def echo(self) -> dict[str, Any]:
        """The fields of the request that its response repeats."""
        return self._echo

    @property
    def echo_bytes(self) -> int:
        """The size of `echo` in JSON."""
        return self._echo_bytes

    def renamed(self, error: ApiError) -> ApiError:
        """An error of the chat, with this body's name of the field."""
        fields, message = error.error, error.error["message"]
        old = next((word for word in CHAT_WORDS if message.startswith(word)), None)
        if old is not None:
            message = CHAT_WORDS[old] + message.removeprefix(old)
        param = CHAT_WORDS.get(fields["param"], fields["param"])
        return ApiError(error.status, message, kind=fields["type"], param=param, code=fields["code"], retry=error.retry)

    def _chat_fields(self) -> dict[str, Any]:
        """The fields of the chat that this body has in other forms."""
        system = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        logprobs = LOGPROBS in self.include
        return {
            "model": self.model,
            "stream": self.stream,
            "messages": [*system, *self.input],
            "max_completion_tokens": self.max_output_tokens,
            "tools": [chat_tool(tool) for tool in self.tools],
            "tool_choice": chat_tool_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": chat_format(self.text["format"]),
            "logprobs": logprobs,
            "top_logprobs": self.top_logprobs if logprobs else None,
            "user": self.user or self.safety_identifier,
        }

    def _echoed(self, chat: ChatBody) -> dict[str, Any]:
        names = (
            "model",
            "instructions",
            "max_output_tokens",
            "metadata",
            "parallel_tool_calls",
            "safety_identifier",
            "text",
            "tool_choice",
            "tools",
            "top_logprobs",
            "user",
        )
        chat_names = ("prompt_cache_key", "temperature", "top_p")
        return {
            **{name: getattr(self, name) for name in names},
            **{name: getattr(chat, name) for name in chat_names},
            "background": False,
            "previous_response_id": None,
            "store": False,
            # What `auto` would drop is refused.
            "truncation": "disabled",
        }


NOT_PASSED = {*ResponsesBody.model_fields, *REFUSED, "stream_options"}
"""Fields that the chat does not get as they are."""
FIELDS = {*ResponsesBody.model_fields, *REFUSED, *CHAT_WORDS.values(), "truncation"}
"""All fields that errors name."""


def _check_refused(data: dict[str, Any]) -> None:
    for name, (neutral, instead) in REFUSED.items():
        value = data.get(name)
        if value is not None and not any(type(value) is type(same) and value == same for same in neutral):
            raise ApiError(400, f"{name} is not supported: {instead}", param=name)


def not_stored(name: str) -> ApiError:
    """The error for a response that is asked for by its id."""
    message = f"The response {name!r} does not exist: this server stores no responses; keep them in the client."
    return ApiError(404, message, param="response_id", code="response_not_found")
