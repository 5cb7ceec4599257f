"""The plain loop on a dense KV: the oracle of every test, and the notebook's tool.

One sequence, one token at a time, no batching, no cache reuse. Our boundary rule (paper.md): the base encodes
x_1..x_{n-1}; the decode module consumes x_n as its first input and samples y_1.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pshare_jax.errors import PshareError
from pshare_jax.model.kv import DenseKV
from pshare_jax.sampling import SamplingParams, sample
from pshare_jax.share import SharedModel

GREEDY = SamplingParams()


@dataclass(frozen=True)
class Rollout:
    """What one generation gave: new ids, and the smallest gap between the two best scores of any choice it made.

    A test that compares two runs draws another prompt where `smallest_gap` is under 1e-4, so that equality stays exact.
    """

    ids: list[int]
    smallest_gap: float


def generate(
    shared: SharedModel,
    task: str,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: Collection[int] | None = None,
) -> list[int]:
    """New token ids only, the end token included if one came; `stop_ids` None means the model's end set, () none."""
    return rollout(shared, task, prompt_ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids).ids


def rollout(
    shared: SharedModel,
    task: str,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: Collection[int] | None = None,
) -> Rollout:
    """`generate` with the smallest top-two gap. Raises `PshareError` if prompt and answer exceed the model's context."""
    if len(prompt_ids) == 0:
        raise PshareError("the prompt is empty: at least one token is needed.")
    if max_new_tokens < 0:
        raise PshareError(f"max_new_tokens must not be negative, but is {max_new_tokens}.")
    if len(prompt_ids) + max_new_tokens > shared.config.max_len:
        raise PshareError(
            f"the model's maximum context length is {shared.config.max_len} tokens, but the prompt has {len(prompt_ids)} "
            f"and {max_new_tokens} more were asked for."
        )
    kv = shared.transfer(shared.prefill([list(prompt_ids[:-1])]))
    return continue_from(shared, task, kv, prompt_ids[-1], max_new_tokens, sampling, stop_ids)


def continue_from(
    shared: SharedModel,
    task: str,
    kv: DenseKV,
    last_prompt_id: int,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: Collection[int] | None = None,
) -> Rollout:
    """Generate from a context's KV on the decode mesh; `kv` is left as it was, so that other tasks may start from it."""
    stops = shared.model.stop_ids if stop_ids is None else stop_ids
    kv = kv.copy(kv.length + max_new_tokens)
    ids: list[int] = []
    smallest_gap = float("inf")
    token = last_prompt_id
    while len(ids) < max_new_tokens:
        logits, kv = shared.decode(task, [[token]], kv, donate=True)
        chosen, gap = sample(logits[0, -1], sampling, kv.length)
        token, smallest_gap = int(chosen), min(smallest_gap, float(gap))
        ids.append(token)
        if token in stops:
            break
    return Rollout(ids, smallest_gap)
