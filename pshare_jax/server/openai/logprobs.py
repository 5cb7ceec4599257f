"""OpenAI's two forms of logprobs, from those that the sampler reports.

A token is reported by its own bytes (independent of its neighbours), so the bytes of all entries are the text in UTF-8. The
id that ends a completion has an entry in /v1/completions (clients expect an entry per token) and none in a chat. Control
tokens are reported by their own text, which the completion's text does not show.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pshare_jax.engine.request import TokenLogprobs
from pshare_jax.text.encoder import Encoder

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot represent."""

TokenBytes = Callable[[int], bytes]


def token_text(data: bytes) -> str:
    """A token as a string; if it is not valid UTF-8, its bytes in hex after `bytes:`, as in OpenAI's API."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_entry(token: TokenLogprobs, token_bytes: TokenBytes) -> dict[str, Any]:
    """An entry of a chat's `logprobs.content`."""
    top = [_chat_token(token_id, logprob, token_bytes) for token_id, logprob in token.top]
    return {**_chat_token(token.token_id, token.logprob, token_bytes), "top_logprobs": top}


def _chat_token(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    data = token_bytes(token_id)
    return {"token": token_text(data), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(data)}


class TextLogprobs:
    """The `logprobs` objects of one choice: four lists with an entry per token; `text_offset` counts characters."""

    def __init__(self, tokenizer: Encoder):
        self._tokenizer = tokenizer
        self._characters = 0

    def of(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], *, visible: range = range(0)
    ) -> dict[str, Any]:
        """The object for the next tokens; the text contains control tokens only at the indices `visible`."""
        return {
            "tokens": [self._text(token_id) for token_id in token_ids],
            "token_logprobs": [None if token is None else max(token.logprob, MIN_LOGPROB) for token in logprobs],
            "top_logprobs": [None if token is None else self._top(token) for token in logprobs],
            "text_offset": [self._offset(token_id, index in visible) for index, token_id in enumerate(token_ids)],
        }

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        """The best tokens and the chosen token."""
        pairs = [*token.top, (token.token_id, token.logprob)]
        return {self._text(token_id): max(logprob, MIN_LOGPROB) for token_id, logprob in reversed(pairs)}

    def _text(self, token_id: int) -> str:
        return token_text(self._tokenizer.token_bytes(token_id))

    def _offset(self, token_id: int, shows_control: bool) -> int:
        """The index of the token's first character, which may have begun in an earlier token."""
        data = self._visible_bytes(token_id, shows_control)
        start = self._characters - (1 if data and _continues(data[0]) and self._characters else 0)
        self._characters += sum(not _continues(byte) for byte in data)
        return start

    def _visible_bytes(self, token_id: int, shows_control: bool) -> bytes:
        """The token's part of the text."""
        if token_id in self._tokenizer.special_ids and not shows_control:
            return b""
        data = self._tokenizer.token_bytes(token_id)
        # SentencePiece tokenizers drop the first space of a text.
        dropped = not self._characters and data[:1] == b" " and not self._tokenizer.decode([token_id]).startswith(" ")
        return data[1:] if dropped else data


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The concatenation of two such objects."""
    return {name: [*first[name], *second[name]] for name in first}


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80
