"""Calls of the `tokenizers` library that do not stop the rest of the process.

Its calls for one text keep Python's lock while they work, seconds for megabytes; its calls for a batch release it. Short
texts are encoded alone, since a batch starts the library's threads.
"""

from collections.abc import Sequence

from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

LONG_TEXT = 4096
"""Characters or ids, which take about a millisecond."""


def encode_ids(backend: Backend, text: str) -> list[int]:
    """The ids of valid Unicode, without added special tokens."""
    if len(text) <= LONG_TEXT:
        return backend.encode(text, add_special_tokens=False).ids
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


def encode_offsets(backend: Backend, text: str) -> Encoding:
    """Likewise, with the offsets of the tokens in the text."""
    if len(text) <= LONG_TEXT:
        return backend.encode(text, add_special_tokens=False)
    return backend.encode_batch([text], add_special_tokens=False)[0]


def decode(backend: Backend, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """The text of ids."""
    if len(ids) <= LONG_TEXT:
        return backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
    return backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]
