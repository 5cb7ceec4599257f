"""Scoring steps: a decode module reads prompt tokens, for their log-probabilities or to continue a begun answer.

The decode worker runs them before a sequence generates. This module prepares their inputs; model/paged_batch.py
(`ScoreBatch`) describes what they compute.
"""

from typing import Any

import numpy as np

from pshare_jax.engine.request import TokenLogprobs
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.shapes import Shape, padded_batch
from pshare_jax.model.paged_batch import ScoreBatch

SCORE_TOKENS = 64
"""Tokens of a step: longer steps would delay the worker's running answers."""
SHAPE: Shape = ("score",)
UNAVAILABLE = (
    "The server could not compile its scoring step, which echo with logprobs and response_start need; its log says why."
)


def no_rows(table_len: int) -> tuple[np.ndarray, ScoreBatch]:
    """Tokens `[1, SCORE_TOKENS]` and metadata of a step on padding alone."""
    tokens, batch = padded_batch((1, SCORE_TOKENS), table_len)
    return tokens, ScoreBatch(batch, np.zeros_like(tokens), np.array(False))


def next_rows(sequence: Sequence, table_len: int) -> tuple[np.ndarray, ScoreBatch, int]:
    """Tokens, metadata and the number of real tokens of the sequence's next step."""
    start, end = sequence.to_score
    end = min(end, start + SCORE_TOKENS)
    held, prompt = sequence.decode.table, sequence.request.prompt
    assert held is not None
    tokens, batch = padded_batch((1, SCORE_TOKENS), table_len, [(held.pages, start, prompt[start:end])])
    targets = np.zeros_like(tokens)
    targets[0, : end - start] = prompt[start + 1 : end + 1]
    return tokens, ScoreBatch(batch, targets, np.array(sequence.request.response_start is None)), end - start


def reported(sequence: Sequence, scores: Any, num_tokens: int) -> list[TokenLogprobs]:
    """A step's scores of its real tokens, on the host."""
    start, wanted = sequence.to_score[0], sequence.request.logprobs or 0
    logprobs, top_ids, top_logprobs = (np.asarray(array)[0] for array in scores)
    targets = sequence.request.prompt[start + 1 : start + 1 + num_tokens]
    return [
        TokenLogprobs.of(target, logprobs[index], top_ids[index], top_logprobs[index], wanted)
        for index, target in enumerate(targets)
    ]
