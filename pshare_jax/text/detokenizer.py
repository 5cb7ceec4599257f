"""Token ids to text, one token at a time: whole characters only, in constant time per token.

Made by `Tokenizer.detokenizer()`; the server pushes each generated id and streams the returned text. All pushes plus the
flush equal `tokenizer.decode(all ids)` for any ids, also partial characters, stray bytes and control tokens. Byte-level
vocabularies and SentencePiece vocabularies with byte fallback (Gemma, Llama 2) are supported.
"""

import codecs
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from pshare_jax.errors import PshareError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@runtime_checkable
class Detokenizer(Protocol):
    """The state of one choice's text; not to be used after `flush`."""

    def push(self, token_id: int) -> str:
        """The text that is final after `token_id`; often "" in the middle of a character."""
        ...

    def flush(self) -> str:
        """The remaining text; an incomplete character becomes U+FFFD, as in a plain decode."""
        ...


@runtime_checkable
class TokenBytes(Protocol):
    """How a vocabulary represents text: the bytes of one token, and how a stream of tokens is decoded."""

    def of(self, token: str) -> bytes:
        """The bytes of `token` (an ordinary vocabulary entry)."""
        ...

    def detokenizer(self, token_of: Callable[[int], str | None]) -> Detokenizer:
        """A new stream; `token_of` gives an id's vocabulary entry, None for ids without text."""
        ...


def token_bytes_for(decoder: Mapping[str, Any] | None) -> TokenBytes:
    """The implementation for the `decoder` entry of a tokenizer.json; an unknown kind is a PshareError."""
    steps = decoder.get("decoders", [decoder]) if decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevel()
    fallback = kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"])
    if fallback and "String" in steps[0]["pattern"] and all(step["stop"] == 0 for step in steps[3:]):
        strip = (steps[3]["content"], steps[3]["start"]) if steps[3:] else ("", 0)
        return ByteFallback(steps[0]["pattern"]["String"], steps[0]["content"], *strip)
    raise PshareError(
        f"The tokenizer's decoder {json.dumps(decoder)} is not supported; supported are ByteLevel, and the sequence "
        "Replace, ByteFallback, Fuse with an optional Strip on the left."
    )


def byte_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level vocabularies: printable Latin-1 as itself, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


class ByteLevel:
    """Each character of a token is one byte (GPT-2's scheme)."""

    def __init__(self) -> None:
        self._byte_of = byte_alphabet()

    def of(self, token: str) -> bytes:
        """The token's bytes; a token with a character outside the byte alphabet is plain text."""
        try:
            return bytes(self._byte_of[char] for char in token)
        except KeyError:
            return token.encode("utf-8")

    def detokenizer(self, token_of: Callable[[int], str | None]) -> Detokenizer:
        """A new stream of UTF-8 bytes."""
        return _ByteLevelStream(self, token_of)


class ByteFallback:
    """Tokens are text with "▁" for a space; `<0xE2>` tokens are single bytes."""

    def __init__(self, blank: str, blank_text: str, strip: str, strip_count: int) -> None:
        self._blank, self._blank_text = blank, blank_text
        self.strip, self.strip_count = strip, strip_count

    def of(self, token: str) -> bytes:
        """The token's byte, or its text in UTF-8."""
        byte = self.byte(token)
        return self.text(token).encode("utf-8") if byte is None else bytes([byte])

    def byte(self, token: str) -> int | None:
        """The byte of `token`, None for a text token."""
        match = _BYTE_TOKEN.fullmatch(token)
        return int(match[1], 16) if match else None

    def text(self, token: str) -> str:
        """A text token's text."""
        return token.replace(self._blank, self._blank_text)

    def detokenizer(self, token_of: Callable[[int], str | None]) -> Detokenizer:
        """A new stream of text tokens and byte runs."""
        return _ByteFallbackStream(self, token_of)


class _ByteLevelStream:
    def __init__(self, codec: ByteLevel, token_of: Callable[[int], str | None]) -> None:
        self._codec, self._token_of = codec, token_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._token_of(token_id)
        return "" if token is None else self._decoder.decode(self._codec.of(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallbackStream:
    """Byte tokens are held back until their run ends, because one invalid byte turns the *whole* run into U+FFFD."""

    def __init__(self, codec: ByteFallback, token_of: Callable[[int], str | None]) -> None:
        self._codec, self._token_of = codec, token_of
        self._run = bytearray()
        self._to_strip = codec.strip_count

    def push(self, token_id: int) -> str:
        token = self._token_of(token_id)
        if token is None:
            return ""
        byte = self._codec.byte(token)
        if byte is not None:
            self._run.append(byte)
            return ""
        return self._stripped(self._end_run() + self._codec.text(token))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._codec.strip):
                self._to_strip = 0
                break
            text = text[len(self._codec.strip) :]
            self._to_strip -= 1
        return text
