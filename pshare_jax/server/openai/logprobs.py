"""OpenAI's two shapes of log-probabilities, from what the sampler reports. Host-side, imports no jax.

A token is told by its own bytes (never as it would look after its neighbours), so that the bytes of all entries are the
answer's text in UTF-8. The id that ends an answer has an entry in a completion (clients count on one for every token) and
none in a chat; control tokens are told by their own text, which the answer does not show.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pshare_jax.engine.request import TokenLogprobs
from pshare_jax.text.encoder import Encoder

LEAST = -9999.0
"""Stands for minus infinity, which JSON does not have."""

TokenBytes = Callable[[int], bytes]


def token_text(data: bytes) -> str:
    """A token as a string; if it holds parts of characters, its bytes written out after `bytes:`, as OpenAI does."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_entry(one: TokenLogprobs, token_bytes: TokenBytes) -> dict[str, Any]:
    """An entry of `logprobs.content` of a chat."""
    top = [_chat_token(token_id, logprob, token_bytes) for token_id, logprob in one.top]
    return {**_chat_token(one.token_id, one.logprob, token_bytes), "top_logprobs": top}


def _chat_token(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    data = token_bytes(token_id)
    return {"token": token_text(data), "logprob": max(logprob, LEAST), "bytes": list(data)}


class TextLogprobs:
    """The `logprobs` objects of one completion: four lists, one entry a token; `text_offset` counts characters."""

    def __init__(self, tokenizer: Encoder):
        self._tokenizer = tokenizer
        self._characters = 0

    def of(
        self, token_ids: Sequence[int], told: Sequence[TokenLogprobs | None], *, shown: range = range(0)
    ) -> dict[str, Any]:
        """The object for the next tokens (None: without a log-probability); of those at `shown` the text shows control
        tokens too.
        """
        return {
            "tokens": [self._text(token_id) for token_id in token_ids],
            "token_logprobs": [None if one is None else max(one.logprob, LEAST) for one in told],
            "top_logprobs": [None if one is None else self._top(one) for one in told],
            "text_offset": [self._offset(token_id, index in shown) for index, token_id in enumerate(token_ids)],
        }

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """The best tokens and the one that was taken."""
        pairs = [*one.top, (one.token_id, one.logprob)]
        return {self._text(token_id): max(logprob, LEAST) for token_id, logprob in reversed(pairs)}

    def _text(self, token_id: int) -> str:
        return token_text(self._tokenizer.token_bytes(token_id))

    def _offset(self, token_id: int, shows_control: bool) -> int:
        """Where the token's first character begins, perhaps with bytes of tokens before it."""
        data = self._shown(token_id, shows_control)
        begins = self._characters - (1 if data and _continues(data[0]) and self._characters else 0)
        self._characters += sum(not _continues(byte) for byte in data)
        return begins

    def _shown(self, token_id: int, shows_control: bool) -> bytes:
        """What the token writes into the text."""
        if token_id in self._tokenizer.special_ids and not shows_control:
            return b""
        data = self._tokenizer.token_bytes(token_id)
        # SentencePiece tokenizers drop a text's first blank.
        dropped = not self._characters and data[:1] == b" " and not self._tokenizer.decode([token_id]).startswith(" ")
        return data[1:] if dropped else data


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two objects after each other."""
    return {name: [*first[name], *second[name]] for name in first}


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80
