"""Tokenizer endpoints, compatible with vLLM's: /tokenize, /detokenize and /tokenizer_info."""

from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import Field, WithJsonSchema, model_validator

from pshare_jax.errors import PshareError
from pshare_jax.server.openai.bodies import maybe_threaded, read_body
from pshare_jax.server.openai.fields import check_messages, continues
from pshare_jax.server.openai.json_bytes import LargeJSONResponse
from pshare_jax.server.openai.logprobs import token_text
from pshare_jax.server.openai.schema import MESSAGES_SCHEMA, ApiError, RequestBody, body_schema, sent_true
from pshare_jax.server.openai.to_requests import Limits
from pshare_jax.text.chat_style import ChatStyle, StyleOf
from pshare_jax.text.encoder import Encoder


class TokenizeBody(RequestBody):
    """POST /tokenize: a text or a chat. The task `model` decides on the chat's style; all share the base's tokenizer."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], WithJsonSchema(MESSAGES_SCHEMA)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False

    @classmethod
    def checks(cls) -> dict[str, Any]:
        """The messages' check."""
        return {"messages": check_messages}

    @model_validator(mode="after")
    def _has_exactly_one_input(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt and messages exclude each other; send exactly one of them.")
        # Raises if the fields contradict each other.
        _ = self.continues
        return self

    @property
    def continues(self) -> bool:
        """Whether the chat ends within its last message."""
        prompted = sent_true(self, "add_generation_prompt")
        return self.messages is not None and continues(self.messages, self.continue_final_message, prompted)


class DetokenizeBody(RequestBody):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0)]]


def add_token_routes(app: FastAPI, tokenizer: Encoder, limits: Limits, max_body_bytes: int, style_of: StyleOf) -> None:
    """Adds the endpoints to the application."""

    @app.post("/tokenize", openapi_extra=body_schema(TokenizeBody))
    async def tokenize(http: Request) -> Response:
        body, size = await read_body(http, TokenizeBody, max_body_bytes)

        def respond() -> Response:
            tokens = _encode(tokenizer, body, style_of(body.model or ""))
            texts = [token_text(tokenizer.token_bytes(token)) for token in tokens] if body.return_token_strs else None
            return LargeJSONResponse(
                {"count": len(tokens), "max_model_len": limits.max_len, "tokens": tokens, "token_strs": texts}
            )

        return await maybe_threaded(size, respond)

    @app.post("/detokenize", openapi_extra=body_schema(DetokenizeBody))
    async def detokenize(http: Request) -> Response:
        body, size = await read_body(http, DetokenizeBody, max_body_bytes)
        if max(body.tokens, default=0) >= limits.vocab_size:
            raise ApiError(400, f"tokens contains an id outside 0 to {limits.vocab_size - 1}.", param="tokens")
        return await maybe_threaded(
            size, lambda: LargeJSONResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})
        )

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return {**tokenizer.special_tokens, "chat_template": tokenizer.chat_template, "vocab_size": limits.vocab_size}


def _encode(tokenizer: Encoder, body: TokenizeBody, style: ChatStyle) -> list[int]:
    try:
        if body.messages is None:
            return tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        options = {"tools": body.tools or None, "template_kwargs": body.chat_template_kwargs, "style": style}
        if body.continues:
            return tokenizer.encode_begun(body.messages, **options)[0]
        return tokenizer.encode_chat(body.messages, add_generation_prompt=body.add_generation_prompt, **options)
    except PshareError as error:
        raise ApiError(400, str(error), param="prompt" if body.messages is None else "messages") from None
