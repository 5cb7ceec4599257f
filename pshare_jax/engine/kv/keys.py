"""Names the full pages of a prompt by content: the one key function of every page manager and of the router.

A key chains over what determines the page's KV: the weights (fingerprint), the tenant (salt), all tokens before it and
its own. Keys are SHA-256 over length-framed bytes, so they are equal in every process.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

from pshare_jax.share.boundary import shareable_pages

_TOKEN_BYTES = 4
_length = struct.Struct("<Q").pack


class PageKey(NamedTuple):
    """One full page: the chained digest, and the bytes that it stands for beyond the previous page's digest.

    A page is found by `digest`, and is a hit only if `content` is equal too and the page before it is the same.
    """

    digest: bytes
    content: bytes


def page_keys(
    fingerprint: str, salt: str, context: Sequence[int], page_size: int, known: Sequence[PageKey] = ()
) -> list[PageKey]:
    """The keys of the full pages of `context`, the tokens of a prompt that the base encodes (share/boundary.py).

    `known` are the keys of an earlier, shorter context that this one extends (same fingerprint, salt and page size); only
    the keys beyond them are computed.

    Raises:
        struct.error: a token id is negative or needs more than 32 bits.
    """
    num_pages = shareable_pages(len(context), page_size)
    keys = list(known[:num_pages])
    tokens = context[len(keys) * page_size : num_pages * page_size]
    data, size = struct.pack(f"<{len(tokens)}I", *tokens), page_size * _TOKEN_BYTES
    digest = keys[-1].digest if keys else b""
    for start in range(0, len(data), size):
        content = data[start : start + size]
        if not keys:
            content = _framed(_utf8(fingerprint), _utf8(salt), content)
        # As `_framed(digest, content)`, but this is where the time goes.
        digest = _digest(b"".join((_length(len(digest)), digest, _length(len(content)), content)))
        keys.append(PageKey(digest, content))
    return keys


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _framed(*parts: bytes) -> bytes:
    """Joins so that no two lists of parts give the same bytes."""
    return b"".join(_length(len(part)) + part for part in parts)


def _utf8(text: str) -> bytes:
    # JSON may carry half a surrogate pair in a salt, which is a valid salt.
    return text.encode("utf-8", "surrogatepass")
