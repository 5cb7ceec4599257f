"""How a request wants its tokens chosen, and the same for the rows of a batch as NumPy arrays. Imports no jax.

The plain loop and the server fill these in; pshare_jax/sampling/sample.py carries them out on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt32

from pshare_jax.errors import PshareError

ALMOST_GREEDY = 1e-5
"""Temperatures below this are greedy: scores divided by less overflow float32, and the draw would be the best token anyway."""


NUM_TOP = 20
"""How many best tokens come with the logprobs."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token from the model's float32 logits, in this order:

    1. Repetition penalty (CTRL, arXiv 1909.05858) on every token that prompt or answer hold: positive logits are divided
       by `repetition_penalty`, the others multiplied. 1 is off.
    2. `logit_bias - frequency_penalty * count - presence_penalty * (count > 0)` is added, where `count` is how often the
       token stands in the answer so far (the prompt does not count). `logit_bias` holds (token id, bias) pairs; -inf bans
       the token, and the biases of an id named twice add up. 0 and () are off.
    3. Banned ids go to -inf: the stop ids while fewer than the request's `min_tokens` are out.
    4. `temperature` under `ALMOST_GREEDY` takes the best score. Else scores are divided by it, cut to the `top_k` best
       (0 is off), then to the top-p nucleus (1 is off), then to those with at least `min_p` times the best one's
       probability (0 is off), and one is drawn; the draw depends on (`seed`, `choice`, position) alone. `choice` numbers
       the n answers of a request.

    Logprobs are the log-softmax of the raw logits, before all of this. Raises `PshareError` for a penalty or bias that
    gives no scores.
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
            raise PshareError(f"repetition_penalty must be a number above 0, but is {self.repetition_penalty}.")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise PshareError(f"{name} must be a finite number, but is {getattr(self, name)}.")
        for token, bias in self.logit_bias:
            if not bias < math.inf:
                raise PshareError(f"logit_bias of token {token} must be a finite number or -inf, but is {bias}.")

    @property
    def is_greedy(self) -> bool:
        """Whether the best score is taken, without a draw."""
        return self.temperature < ALMOST_GREEDY

    @property
    def penalizes_answer(self) -> bool:
        """Whether scores depend on how often tokens stand in the answer."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_adjustments(self) -> bool:
        """Whether logits must be changed (steps 1 and 2) before the choice; bans by `min_tokens` come on top."""
        return self.penalizes_answer or self.repetition_penalty != 1 or bool(self.logit_bias)

    def check_vocabulary(self, size: int) -> None:
        """Raises `PshareError` if `logit_bias` names a token that a vocabulary of `size` does not have."""
        for token, _ in self.logit_bias:
            if not 0 <= token < size:
                raise PshareError(f"logit_bias names token {token}, but token ids are 0 to {size - 1}.")


class SamplingRows(NamedTuple):
    """`SamplingParams` of the rows of a batch, and the absolute position that each row's token will have."""

    temperature: Float32[np.ndarray, "B"]
    top_k: Int32[np.ndarray, "B"]
    top_p: Float32[np.ndarray, "B"]
    min_p: Float32[np.ndarray, "B"]
    seed: UInt32[np.ndarray, "B 2"]
    choice: UInt32[np.ndarray, "B"]
    position: UInt32[np.ndarray, "B"]
    repetition_penalty: Float32[np.ndarray, "B"]


GREEDY = SamplingParams()


def sampling_rows(params: Sequence[SamplingParams], positions: Sequence[int], num_rows: int) -> SamplingRows:
    """Rows for `params` in their order, filled up with greedy ones to `num_rows` (at least `len(params)`)."""
    padding = num_rows - len(params)
    rows = [*params, *[GREEDY] * padding]
    return SamplingRows(
        # Rounding to float32 may lift a greedy temperature over the limit, so it is written as 0.
        temperature=np.array([0 if row.is_greedy else row.temperature for row in rows], np.float32),
        top_k=np.array([row.top_k for row in rows], np.int32),
        top_p=np.array([row.top_p for row in rows], np.float32),
        min_p=np.array([row.min_p for row in rows], np.float32),
        # The two halves of a 64-bit seed, as jax.random.key would take them with 64-bit types switched on.
        seed=np.array([[row.seed >> 32 & 0xFFFFFFFF, row.seed & 0xFFFFFFFF] for row in rows], np.uint32),
        choice=np.array([row.choice for row in rows], np.uint32),
        position=np.array([*positions, *[0] * padding], np.uint32),
        repetition_penalty=np.array([row.repetition_penalty for row in rows], np.float32),
    )
