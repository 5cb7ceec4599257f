"""A request's sampling parameters, and those of a batch's rows as NumPy arrays.

Generation and the server fill them in; sampling/sample.py applies them on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from pshare_jax.errors import PshareError

ALMOST_GREEDY = 1e-5
"""Temperatures below this are greedy: dividing by less overflows float32, and would draw the best token anyway."""


NUM_TOP = 20
"""The number of best tokens reported with the logprobs."""


MAX_BIASES = 1024
"""The number of tokens for which a request may have a `logit_bias`: the sampler has room for so many in each row."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token from the model's float32 logits, in this order:

    1. Repetition penalty (CTRL, arXiv 1909.05858) on every token of the prompt and the completion: positive logits are
       divided by `repetition_penalty`, the others multiplied. 1 is off.
    2. `logit_bias - (frequency_penalty * count + presence_penalty * (count > 0))` is added, where `count` is the number
       of times that the token occurs in the completion so far, without the prompt; product, sum and difference are
       rounded to float32. `logit_bias` holds at most `MAX_BIASES` (token id, bias) pairs; -inf bans the token, and biases
       of a repeated id add up. 0 and () are off.
    3. Banned ids are set to -inf: the stop ids until `min_tokens` tokens are generated.
    4. With a grammar (text/grammar.py), ids that it does not allow next are set to -inf. It decides about stop ids too, so
       that step 3 leaves them out.
    5. `temperature` under `ALMOST_GREEDY` takes the best score. Otherwise scores are divided by it, restricted to the
       `top_k` best (0 is off), then to the top-p nucleus (1 is off), then to those with at least `min_p` times the
       highest probability (0 is off), and one token is drawn; the draw depends on (`seed`, `choice`, position) alone.
       `choice` numbers the n choices of a request.

    Logprobs are the log-softmax of the raw logits, before all of this. Raises `PshareError` for a penalty or bias out of
    range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        if not (0 < self.repetition_penalty < math.inf):
            raise PshareError(f"repetition_penalty must be a finite number above 0, not {self.repetition_penalty}.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise PshareError(f"{name} must be a finite number, not {getattr(self, name)}.")
        for token, bias in self.logit_bias:
            if not bias < math.inf:
                raise PshareError(f"logit_bias of token {token} must be a finite number or -inf, not {bias}.")
        if len(self.bias_of_token) > MAX_BIASES:
            raise PshareError(
                f"logit_bias has {len(self.bias_of_token)} tokens; at most {MAX_BIASES} are allowed, so name fewer."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is taken, without a draw."""
        return self.temperature < ALMOST_GREEDY

    @property
    def penalizes_completion(self) -> bool:
        """Whether scores depend on token counts in the completion."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_adjustments(self) -> bool:
        """Whether steps 1 and 2 change the logits; bans by `min_tokens` are not included."""
        return self.penalizes_completion or self.repetition_penalty != 1 or bool(self.logit_bias)

    @property
    def counts_completion(self) -> bool:
        """Whether scores depend on which tokens the completion has."""
        return self.penalizes_completion or self.repetition_penalty != 1

    @property
    def bias_of_token(self) -> dict[int, float]:
        """`logit_bias` with the biases of a repeated id added up."""
        biases: dict[int, float] = {}
        for token, bias in self.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        return biases

    def check_vocabulary(self, size: int) -> None:
        """Raises `PshareError` if `logit_bias` has a token id outside a vocabulary of `size`."""
        for token, _ in self.logit_bias:
            if not 0 <= token < size:
                raise PshareError(f"logit_bias has the token id {token}; token ids are 0 to {size - 1}.")


class SamplingRows(NamedTuple):
    """`SamplingParams` of a batch's rows, and the absolute position of each row's next token."""

    temperature: Float32[np.ndarray, "B"]
    top_k: Int32[np.ndarray, "B"]
    top_p: Float32[np.ndarray, "B"]
    min_p: Float32[np.ndarray, "B"]
    seed: UInt32[np.ndarray, "B 2"]
    choice: UInt32[np.ndarray, "B"]
    position: UInt32[np.ndarray, "B"]
    repetition_penalty: Float32[np.ndarray, "B"]


GREEDY = SamplingParams()


def mask_words(vocab_size: int) -> int:
    """The number of 32-bit words with a bit for each token."""
    return -(-vocab_size // 32)


def all_allowed(num_rows: int, vocab_size: int) -> Int32[np.ndarray, "B words"]:
    """Masks that allow every token: bit i of word w of a row is that of id 32 * w + i."""
    return np.full((num_rows, mask_words(vocab_size)), -1, np.int32)


def sampling_rows(params: Sequence[SamplingParams], positions: Sequence[int], num_rows: int) -> SamplingRows:
    """Rows for `params` in order, padded with greedy rows to `num_rows` (at least `len(params)`)."""
    padding = num_rows - len(params)
    rows = [*params, *[GREEDY] * padding]
    return SamplingRows(
        # Rounding to float32 may lift a greedy temperature above the limit, so it is written as 0.
        temperature=np.array([0 if row.is_greedy else row.temperature for row in rows], np.float32),
        top_k=np.array([row.top_k for row in rows], np.int32),
        top_p=np.array([row.top_p for row in rows], np.float32),
        min_p=np.array([row.min_p for row in rows], np.float32),
        # The two halves of a 64-bit seed, as jax.random.key splits it when 64-bit types are enabled.
        seed=np.array([[row.seed >> 32 & 0xFFFFFFFF, row.seed & 0xFFFFFFFF] for row in rows], np.uint32),
        choice=np.array([row.choice for row in rows], np.uint32),
        position=np.array([*positions, *[0] * padding], np.uint32),
        repetition_penalty=np.array([row.repetition_penalty for row in rows], np.float32),
    )
