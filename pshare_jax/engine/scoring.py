"""Scoring steps: a decode module reads prompt tokens, for their log-probabilities or to go on from a begun answer.

The decode worker gives a sequence one step after another before it generates. What is computed is said in
model/paged_batch.py (`ScoreBatch`); here is what is fed to a step.
"""

from typing import Any

import numpy as np

from pshare_jax.engine.request import TokenLogprobs
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.shapes import Shape
from pshare_jax.model.paged_batch import PagedBatch, ScoreBatch

SCORE_TOKENS = 64
"""Tokens of a step: longer ones would hold up the answers that the worker makes meanwhile."""
SHAPE: Shape = ("score",)
UNAVAILABLE = (
    "The server could not compile its scoring step, which echo with logprobs and response_start need; its log says why."
)


def no_rows(table_len: int) -> tuple[np.ndarray, ScoreBatch]:
    """Tokens `[1, SCORE_TOKENS]` and metadata of a step on no sequence."""
    tokens = np.zeros((1, SCORE_TOKENS), np.int32)
    return tokens, ScoreBatch(PagedBatch.empty(1, table_len), np.zeros_like(tokens), np.array(False))


def next_rows(sequence: Sequence, table_len: int) -> tuple[np.ndarray, ScoreBatch, int]:
    """Tokens, metadata and the number of real tokens of the sequence's next step."""
    start, end = sequence.to_score
    end = min(end, start + SCORE_TOKENS)
    held, prompt = sequence.decode.table, sequence.request.prompt
    assert held is not None
    tokens, rows = no_rows(table_len)
    tokens[0, : end - start] = prompt[start:end]
    np.asarray(rows.targets)[0, : end - start] = prompt[start + 1 : end + 1]
    rows.batch.fill(0, held.pages, start, end - start)
    return tokens, rows._replace(independent=np.array(sequence.request.response_start is None)), end - start


def reported(sequence: Sequence, scores: Any, num_tokens: int) -> list[TokenLogprobs]:
    """A step's scores on the host, as far as they are real."""
    start, wanted = sequence.to_score[0], sequence.request.logprobs or 0
    logprobs, top_ids, top_logprobs = (np.asarray(one)[0] for one in scores)
    targets = sequence.request.prompt[start + 1 : start + 1 + num_tokens]
    return [
        TokenLogprobs.of(target, logprobs[index], top_ids[index], top_logprobs[index], wanted)
        for index, target in enumerate(targets)
    ]
