"""The keys of recent prompts, so that a session's next prompt is hashed from where it differs from the last.

The engine asks for the keys of every request in the thread that submits it, without the engine's lock.
"""

import array
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from pshare_jax.engine.kv.keys import PageKey, page_keys

MAX_KNOWN_TOKENS = 2**21
"""All contexts together; a token and its share of a key take about 20 bytes."""
START_TOKENS = 64
"""Contexts without a session that begin with the same tokens count as one session."""


class _Context(NamedTuple):
    """The tokens of a context, uint32, and the keys of its full pages."""

    tokens: np.ndarray
    keys: list[PageKey]


class KnownKeys:
    """The last context of each of the most recently used sessions. Sessions of other tenants or weights are others.

    Its lock guards the table alone: nothing is hashed or compared under it, and no other lock is taken.
    """

    def __init__(self, page_size: int, max_tokens: int = MAX_KNOWN_TOKENS):
        self._page_size, self._max_tokens = page_size, max_tokens
        self._contexts: OrderedDict[Hashable, _Context] = OrderedDict()
        self._num_tokens = 0
        self._lock = threading.Lock()

    def keys(self, session: Hashable, fingerprint: str, salt: str, context: Sequence[int]) -> list[PageKey]:
        """`page_keys` of a context whose ids need at most 32 bits; `session` is None or names calls that share a context."""
        tokens = np.frombuffer(array.array("I", context), np.uint32)
        # Clients choose salts and sessions, of any length.
        start = b"" if session else tokens[:START_TOKENS].tobytes()
        name = sha256(repr((fingerprint, salt, session, start)).encode()).digest()
        with self._lock:
            last = self._contexts.get(name)
        known = [] if last is None else last.keys[: _num_common(last.tokens, tokens) // self._page_size]
        keys = page_keys(fingerprint, salt, context, self._page_size, known)
        if keys:
            # So that each has a page of tokens at least, and the bound holds.
            self._keep(name, _Context(tokens, keys))
        return keys

    def _keep(self, name: Hashable, context: _Context) -> None:
        if len(context.tokens) > self._max_tokens:
            return
        with self._lock:
            replaced = self._contexts.pop(name, None)
            self._contexts[name] = context
            self._num_tokens += len(context.tokens) - (0 if replaced is None else len(replaced.tokens))
            while self._num_tokens > self._max_tokens:
                _, oldest = self._contexts.popitem(last=False)
                self._num_tokens -= len(oldest.tokens)


def _num_common(left: np.ndarray, right: np.ndarray) -> int:
    """Length of the common prefix."""
    most = min(len(left), len(right))
    different = left[:most] != right[:most]
    return int(different.argmax()) if different.any() else most
