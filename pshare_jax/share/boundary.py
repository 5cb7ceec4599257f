"""The boundary rule: where the base's part of a prompt ends and the decode module's begins. Host code without jax.

The base encodes all but the last token of a prompt; the decode module consumes that one as its first input and writes its
KV itself. Serving, training, evaluation and the router ask here; no other file subtracts one.
"""

from typing import TypeVar, overload

import numpy as np

from pshare_jax.errors import PshareError

Length = TypeVar("Length", int, np.ndarray)


@overload
def base_len(prompt_len: int, response_start: int | None = None) -> int: ...
@overload
def base_len(prompt_len: np.ndarray, response_start: None = None) -> np.ndarray: ...
def base_len(prompt_len: int | np.ndarray, response_start: int | None = None) -> int | np.ndarray:
    """Leading tokens of a prompt that the base encodes; the decode module consumes the others itself.

    That is all but the last token. With `response_start` k, tokens k, k + 1, ... are a begun answer of the module's, so
    the base encodes the first k - 1. `prompt_len` may be an array of lengths where there is no `response_start`.

    Raises:
        PshareError: there is no token before the begun answer, or none in it.
    """
    if response_start is None:
        return prompt_len - 1
    if not 1 <= response_start < prompt_len:
        raise PshareError(
            f"response_start is {response_start}, but for a prompt of {prompt_len} tokens it must be at least 1 and less "
            f"than {prompt_len}."
        )
    return response_start - 1


def next_position(num_tokens: Length) -> Length:
    """The position of the last of so many tokens, which is the decode module's next input: KV of all before it is stored."""
    return num_tokens - 1


def shareable_pages(context_len: int, page_size: int) -> int:
    """Full pages among the leading `context_len` tokens that the base encodes; only these are shared."""
    return max(context_len, 0) // page_size


def response_start_at(prompt_len: int, sharing_ratio: float) -> int | None:
    """The `response_start` with which the base encodes floor(sharing_ratio * (prompt_len - 1)) tokens; None at ratio 1."""
    # 0.29 * 100 is 28.999999999999996.
    shared = int(sharing_ratio * base_len(prompt_len) + 1e-9)
    return None if shared == base_len(prompt_len) else shared + 1
