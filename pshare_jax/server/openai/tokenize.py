"""Tokenizer endpoints, compatible with vLLM's: /tokenize, /detokenize and /tokenizer_info."""

from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from pydantic import Field, WithJsonSchema, model_validator

from pshare_jax.errors import PshareError
from pshare_jax.server.openai.bodies import maybe_threaded, read_body
from pshare_jax.server.openai.fields import check_messages
from pshare_jax.server.openai.json_bytes import LargeJSONResponse
from pshare_jax.server.openai.logprobs import token_text
from pshare_jax.server.openai.schema import MESSAGES_SCHEMA, ApiError, RequestBody, body_schema
from pshare_jax.server.openai.to_requests import Limits
from pshare_jax.text.tokenizer import Encoder


class TokenizeBody(RequestBody):
    """POST /tokenize: a text or a chat. `model` is ignored, since all tasks share the base's tokenizer."""

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], WithJsonSchema(MESSAGES_SCHEMA)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
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
        return self


class DetokenizeBody(RequestBody):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0)]]


def add_token_routes(app: FastAPI, tokenizer: Encoder, limits: Limits, max_body_bytes: int) -> None:
    """Adds the endpoints to the application."""

    @app.post("/tokenize", openapi_extra=body_schema(TokenizeBody))
    async def tokenize(http: Request) -> Response:
        body, size = await read_body(http, TokenizeBody, max_body_bytes)

        def respond() -> Response:
            tokens = _encode(tokenizer, body)
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


def _encode(tokenizer: Encoder, body: TokenizeBody) -> list[int]:
    try:
        if body.messages is None:
            return tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return tokenizer.encode_chat(
            body.messages,
            tools=body.tools or None,
            add_generation_prompt=body.add_generation_prompt,
            template_kwargs=body.chat_template_kwargs,
        )
    except PshareError as error:
        raise ApiError(400, str(error), param="prompt" if body.messages is None else "messages") from None
