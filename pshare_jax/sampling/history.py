"""One sequence's logit adjustments (penalties, biases and bans), updated token by token.

The decode worker keeps a `TokenHistory` for each sequence and writes it into the sequence's row of the batch.
"""

from collections.abc import Collection, Sequence

import numpy as np

from pshare_jax.sampling.params import SamplingParams


class TokenHistory:
    """The state of `SamplingParams` steps 1 to 3 for one sequence.

    Arrays of the vocabulary's length are allocated only for the options that the request uses.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        vocab_size: int,
        banned_ids: Collection[int] = (),
        min_tokens: int = 0,
    ):
        """`banned_ids` are banned until `min_tokens` tokens are generated; ids outside the vocabulary are ignored.

        Raises:
            PshareError: `logit_bias` has an id outside the vocabulary.
        """
        sampling.check_vocabulary(vocab_size)
        self._sampling = sampling
        self._banned = np.array([token for token in banned_ids if 0 <= token < vocab_size], np.int64)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._counts: dict[int, int] = {}
        self._logit_bias = sampling.bias_of_token
        self._bias: np.ndarray | None = None
        self._repeated: np.ndarray | None = None
        if sampling.penalizes_completion or sampling.logit_bias:
            self._bias = np.zeros(vocab_size, np.float32)
            for token, bias in self._logit_bias.items():
                self._bias[token] = bias
        if sampling.repetition_penalty != 1:
            self._repeated = np.zeros(vocab_size, bool)
            self._repeated[np.asarray(prompt, np.int64)] = True

    @property
    def active(self) -> bool:
        """Whether the next token's scores may change; if not, `write` would write zeros."""
        return bool(self._logit_bias or self._repeated is not None or self._banned_now or self._counts)

    def push(self, token_id: int) -> None:
        """Adds the completion's next token."""
        self._num_tokens += 1
        if self._repeated is not None:
            self._repeated[token_id] = True
        if self._bias is not None and self._sampling.penalizes_completion:
            count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
            # Computed from the count, so that rounding errors do not accumulate over a long completion.
            self._bias[token_id] = np.float32(self._logit_bias.get(token_id, 0.0)) - self._sampling.penalty(count)

    def write(self, bias_row: np.ndarray, repeated_row: np.ndarray) -> None:
        """Overwrites a row of the batch's `Adjustments` (float32 `[V]` and bool `[V]`)."""
        bias_row[:] = 0 if self._bias is None else self._bias
        repeated_row[:] = False if self._repeated is None else self._repeated
        if self._banned_now:
            bias_row[self._banned] = -np.inf

    @property
    def _banned_now(self) -> bool:
        return self._num_tokens < self._min_tokens and self._banned.size > 0
