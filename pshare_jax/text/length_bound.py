"""A bound on how many bytes of text one token can stand for, so that a text too long for a model is refused unread.

`Tokenizer` is the caller. The bound holds for byte-level vocabularies and those with byte tokens, without normalisers or
splits that remove characters. For any other tokenizer there is none.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

_UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
NFC_SHRINKS = 4
"""At least the most bytes of text for a byte of its NFC form in UTF-8 (7 for 2: U+1FBE, U+0308, U+0301 become U+0390)."""


@dataclass(frozen=True)
class LengthBound:
    """`max_bytes` of text become at most one token, without the bytes `dropped`, which are not in the vocabulary."""

    max_bytes: int
    dropped: bytes = b""

    def least_tokens(self, text: str) -> int:
        """A text of valid Unicode has at least so many tokens."""
        return -(-len(text.encode().translate(None, self.dropped)) // self.max_bytes)


def length_bound(backend: Backend, texts: Iterable[bytes]) -> LengthBound | None:
    """The bound of a tokenizer; `texts`: the bytes of every token. None if its pipeline may drop text."""
    state = json.loads(backend.to_str())
    shrinks, dropped = _shrinks(state["normalizer"]), _dropped(state)
    if shrinks is None or dropped is None or not _keeps_all(state["pre_tokenizer"]):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"]):
        return None
    if shrinks > 1 and dropped:
        # Normalising could turn other bytes into bytes that are dropped.
        return None
    # Raw entries count too: Gemma spells a space with three bytes, and text that has this spelling becomes the same token.
    byte_level = _has_byte_level(state["pre_tokenizer"])
    spelled = () if byte_level else (len(text.encode()) for text in backend.get_vocab(with_added_tokens=True))
    return LengthBound(shrinks * max((*map(len, texts), *spelled), default=1), dropped)


def _shrinks(normalizer: dict[str, Any] | None) -> int | None:
    """Bytes of text for a byte of the normalised text; None if there is no bound."""
    if normalizer is None:
        return 1
    match normalizer["type"]:
        case "NFC":
            return NFC_SHRINKS
        case "Prepend":
            return 1
        case "Replace":
            old = normalizer["pattern"].get("String")
            return 1 if old is not None and len(old.encode()) <= len(normalizer["content"].encode()) else None
        case "Sequence":
            product = 1
            for part in normalizer["normalizers"]:
                if (shrinks := _shrinks(part)) is None:
                    return None
                product *= shrinks
            return product
    return None


def _keeps_all(splits: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer removes no character."""
    if splits is None:
        return True
    if splits["type"] == "Sequence":
        return all(map(_keeps_all, splits["pretokenizers"]))
    return splits["type"] in ("ByteLevel", "Digits", "Metaspace") or (
        splits["type"] == "Split" and splits["behavior"] != "Removed"
    )


def _dropped(state: dict[str, Any]) -> bytes | None:
    """The bytes that no token has, of those in UTF-8; None if unknown characters become something else than nothing."""
    model, vocab = state["model"], state["model"]["vocab"]
    if model["type"] != "BPE" or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        return None
    if _has_byte_level(state["pre_tokenizer"]):
        missing = bytes(byte for byte in _UTF8_BYTES if _spelling(byte) not in vocab)
        return None if missing and model.get("unk_token") else missing
    return b"" if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in _UTF8_BYTES) else None


def _spelling(byte: int) -> str:
    """The character by which byte-level vocabularies write a byte: itself if it is printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + byte - sum(other < byte for other in printable))


def _has_byte_level(splits: dict[str, Any] | None) -> bool:
    if splits is None:
        return False
    return splits["type"] == "ByteLevel" or any(map(_has_byte_level, splits.get("pretokenizers", ())))
