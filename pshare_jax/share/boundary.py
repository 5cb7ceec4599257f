"""The boundary rule: where the base's part of a prompt ends and the decode module's part begins. Host code without jax.

The base encodes all but the last token of a prompt; the decode module consumes the last token as its first input and
writes that token's KV. An activated LoRA has a `Boundary` of its own. Serving, training and evaluation call this module; no
other file subtracts one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np

from pshare_jax.errors import PshareError

Length = TypeVar("Length", int, np.ndarray)


@overload
def base_len(prompt_len: int, response_start: int | None = None) -> int: ...
@overload
def base_len(prompt_len: np.ndarray, response_start: None = None) -> np.ndarray: ...
def base_len(prompt_len: int | np.ndarray, response_start: int | None = None) -> int | np.ndarray:
    """The number of leading prompt tokens that the base encodes; the decode module consumes the others.

    Without `response_start` these are all but the last token. With `response_start` k, tokens k, k + 1, ... start the
    module's answer, so the base encodes the first k - 1. Arrays of lengths are allowed without `response_start`.

    Raises:
        PshareError: no token precedes the answer, or the answer is empty.
    """
    if response_start is None:
        return prompt_len - 1
    if not 1 <= response_start < prompt_len:
        raise PshareError(
            f"response_start must be at least 1 and less than the prompt's {prompt_len} tokens, not {response_start}."
        )
    return response_start - 1


@dataclass(frozen=True)
class Split:
    """One prompt at its module's boundary: the base encodes `base_len` leading tokens, and the module consumes the others.

    A module that is not `active` leaves them to the base's weights, and so the whole answer.
    """

    base_len: int
    active: bool = True


@dataclass(frozen=True)
class Boundary:
    """The boundary rule of a module.

    With an `invocation`, the token sequence of an activated LoRA (`alora_invocation_tokens` in PEFT), the module acts from
    the first token of its last occurrence in the prompt on, and not at all in a prompt without it.
    """

    invocation: tuple[int, ...] = ()

    def split(self, prompt: Sequence[int], response_start: int | None = None) -> Split:
        """The split of a prompt. With `response_start` k, the invocation is looked for in prompt[:k] alone: as in PEFT, what
        a module has answered does not move its boundary.

        Raises:
            PshareError: as `base_len`.
        """
        latest = base_len(len(prompt), response_start)
        if not self.invocation:
            return Split(latest)
        first = _last_occurrence(tuple(prompt[:response_start]), self.invocation)
        return Split(latest, active=False) if first is None else Split(first)


def _last_occurrence(tokens: tuple[int, ...], wanted: tuple[int, ...]) -> int | None:
    """The index of the last place where `wanted` stands in `tokens`."""
    places = range(len(tokens) - len(wanted), -1, -1)
    return next((at for at in places if tokens[at] == wanted[0] and tokens[at : at + len(wanted)] == wanted), None)


def next_position(num_tokens: Length) -> Length:
    """The position of the last of `num_tokens` tokens: the decode module's next input, without stored KV."""
    return num_tokens - 1


def shareable_pages(context_len: int, page_size: int) -> int:
    """The number of full pages in the `context_len` tokens that the base encodes; only full pages are shared."""
    return max(context_len, 0) // page_size


def response_start_at(prompt_len: int, sharing_ratio: float) -> int | None:
    """The `response_start` where the base encodes floor(sharing_ratio * (prompt_len - 1)) tokens; None at ratio 1."""
    # In floating point, 0.29 * 100 is 28.999999999999996.
    shared = int(sharing_ratio * base_len(prompt_len) + 1e-9)
    return None if shared == base_len(prompt_len) else shared + 1
