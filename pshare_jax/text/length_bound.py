"""A bound on how many bytes of text one token can stand for, so that a text too long for a model is refused unread.

`Tokenizer` is the caller. The bound holds for pipelines that drop no text: byte-level or with byte tokens, without
normalisers or splits that remove characters. For any other pipeline there is none.
"""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

NFC_SHRINKS = 4
"""At least the most bytes of text for a byte of its NFC form in UTF-8 (7 for 2: U+1FBE, U+0308, U+0301 become U+0390)."""


def max_token_bytes(backend: Backend, texts: Iterable[bytes]) -> int | None:
    """The most bytes of text that one token stands for; `texts`: the bytes of every token. None without a bound."""
    state = json.loads(backend.to_str())
    shrinks = _shrinks(state["normalizer"])
    if shrinks is None or not _keeps_all(state["pre_tokenizer"]) or not _knows_all_bytes(state):
        return None
    if any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"]):
        return None
    # Raw entries count too: Gemma spells a space with three bytes, and text that has this spelling becomes the same token.
    byte_level = _has_byte_level(state["pre_tokenizer"])
    spelled = () if byte_level else (len(text.encode()) for text in backend.get_vocab(with_added_tokens=True))
    return shrinks * max((*map(len, texts), *spelled), default=1)


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


def _knows_all_bytes(state: dict[str, Any]) -> bool:
    """Whether no character is unknown, since unknown characters may be dropped, or many may become one token."""
    model, vocab = state["model"], state["model"]["vocab"]
    if model["type"] != "BPE" or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        return False
    if _has_byte_level(state["pre_tokenizer"]):
        return all(char in vocab for char in ByteLevel.alphabet())
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocab for byte in range(256))


def _has_byte_level(splits: dict[str, Any] | None) -> bool:
    if splits is None:
        return False
    return splits["type"] == "ByteLevel" or any(map(_has_byte_level, splits.get("pretokenizers", ())))
