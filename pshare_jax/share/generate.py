"""The plain loop on a dense KV: the oracle of every test, and the notebook's tool.

One sequence, one token at a time, no batching, no cache reuse. Our boundary rule: the base encodes
x_1..x_{n-1}; the decode module consumes x_n as its first input and samples y_1.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.model.kv.dense import DenseKV
from pshare_jax.sampling.params import GREEDY, SamplingParams
from pshare_jax.sampling.sample import Adjustments, sample
from pshare_jax.share.boundary import base_len, next_position
from pshare_jax.share.factorize import SharedModel


@dataclass(frozen=True)
class Rollout:
    """What one generation gave: new ids, the smallest gap between the two best scores of any choice, and logprobs.

    A test that compares two runs draws another prompt where `smallest_gap` is under 1e-4, so that equality stays exact.
    `logprobs` are the log-softmax of the raw logits at each new id.
    """

    ids: list[int]
    smallest_gap: float
    logprobs: list[float]


def generate(
    shared: SharedModel,
    task: str,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: Collection[int] | None = None,
    min_tokens: int = 0,
    response_start: int | None = None,
) -> list[int]:
    """New token ids only, the end token included if one came; `stop_ids` None means the model's end set, () none.

    No stop id is chosen among the first `min_tokens` new ids. With `response_start` k the prompt ends with a begun answer:
    the base encodes prompt_ids[:k-1], and the decode module goes on from its own KV of the rest.
    """
    return rollout(
        shared,
        task,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        min_tokens=min_tokens,
        response_start=response_start,
    ).ids


def rollout(
    shared: SharedModel,
    task: str,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: Collection[int] | None = None,
    min_tokens: int = 0,
    response_start: int | None = None,
) -> Rollout:
    """`generate` with gap and logprobs. Raises `PshareError` if prompt and answer exceed the model's context."""
    if len(prompt_ids) == 0:
        raise PshareError("the prompt is empty: at least one token is needed.")
    if max_new_tokens < 0:
        raise PshareError(f"max_new_tokens must not be negative, but is {max_new_tokens}.")
    if len(prompt_ids) + max_new_tokens > shared.config.max_len:
        raise PshareError(
            f"the model's maximum context length is {shared.config.max_len} tokens, but the prompt has {len(prompt_ids)} "
            f"and {max_new_tokens} more were asked for."
        )
    last = next_position(len(prompt_ids))
    context = list(prompt_ids[:last])
    num_base = base_len(len(prompt_ids), response_start)
    kv = shared.transfer(shared.prefill([context[:num_base]]))
    if num_base < len(context):
        kv = shared.decode(task, [context[num_base:]], kv)[1]
    return continue_from(
        shared,
        task,
        kv,
        prompt_ids[last],
        max_new_tokens,
        sampling,
        stop_ids,
        min_tokens=min_tokens,
        context_ids=context,
    )


def score(
    shared: SharedModel, task: str, ids: Sequence[int], *, response_start: int | None = None
) -> list[float | None]:
    """The log-probability of every id but the first (None), the task's module given all before it.

    Each id is scored as if it were the first of an answer: the base encodes all but the last of what is before it, and the
    module consumes that one. With `response_start` k, ids[k:] are scored as one answer, which is what training computes:
    the base encodes ids[:k-1], and the module consumes the rest one after another on its own KV; before k all is None.
    """
    scores: list[float | None] = [None] * len(ids)
    kv = shared.prefill([list(ids[: 0 if response_start is None else base_len(len(ids), response_start)])])
    own = None if response_start is None else shared.transfer(kv)
    for index in range(response_start or 1, len(ids)):
        before = [[ids[base_len(index)]]]
        if own is None:
            logits, _ = shared.decode(task, before, shared.transfer(kv))
            kv = shared.prefill(before, kv)
        else:
            logits, own = shared.decode(task, before, own)
        scores[index] = float(log_softmax(np.asarray(logits[0, -1], np.float64))[ids[index]])
    return scores


def continue_from(
    shared: SharedModel,
    task: str,
    kv: DenseKV,
    last_prompt_id: int,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: Collection[int] | None = None,
    *,
    min_tokens: int = 0,
    context_ids: Sequence[int] = (),
) -> Rollout:
    """Generate from a context's KV on the decode mesh; `kv` is left as it was, so that other tasks may start from it.

    `context_ids` are the tokens that `kv` holds; only a repetition penalty looks at them, and raises `PshareError` if
    they are missing.
    """
    if sampling.repetition_penalty != 1 and len(context_ids) != kv.length:
        raise PshareError(
            f"a repetition penalty needs the tokens of the KV: context_ids has {len(context_ids)} of {kv.length}."
        )
    prompt = [*context_ids, last_prompt_id]
    stops = shared.model.stop_ids if stop_ids is None else stop_ids
    kv = kv.copy(kv.length + max_new_tokens)
    ids: list[int] = []
    logprobs: list[float] = []
    smallest_gap = float("inf")
    while len(ids) < max_new_tokens:
        step, kv = shared.decode(task, [[ids[-1] if ids else last_prompt_id]], kv, donate=True)
        logits = step[0, -1]
        banned = stops if len(ids) < min_tokens else ()
        changes = adjustments(sampling, prompt, ids, banned, logits.shape[0])
        chosen, gap = sample(logits, sampling, kv.length, changes)
        token, smallest_gap = int(chosen), min(smallest_gap, float(gap))
        ids.append(token)
        logprobs.append(float(log_softmax(np.asarray(logits, np.float64))[token]))
        if token in stops:
            break
    return Rollout(ids, smallest_gap, logprobs)


def adjustments(
    sampling: SamplingParams, prompt: Sequence[int], answer: Sequence[int], banned: Collection[int], size: int
) -> Adjustments | None:
    """What `SamplingParams` says about the next token's scores, computed from nothing; None if they stay as they are."""
    if not sampling.needs_adjustments and not banned:
        return None
    sampling.check_vocabulary(size)
    bias, repeated = np.zeros((1, size)), np.zeros((1, size), bool)
    for token, value in sampling.logit_bias:
        bias[0, token] += value
    for token in set(answer):
        bias[0, token] -= sampling.frequency_penalty * answer.count(token) + sampling.presence_penalty
    # A stop id that the vocabulary does not have never comes anyway.
    bias[0, [token for token in banned if 0 <= token < size]] = -np.inf
    if sampling.repetition_penalty != 1:
        repeated[0, [*prompt, *answer]] = True
    return Adjustments(bias.astype(np.float32), repeated)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities `[V]` in the dtype of the logits `[V]`."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
