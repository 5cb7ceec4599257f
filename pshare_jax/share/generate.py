"""The plain generation loop over dense KV: the oracle of the tests, also used by the notebook.

It handles one sequence, one token at a time, without batching or cache reuse. By the boundary rule the base encodes
x_1..x_{n-1} (fewer for an activated LoRA); the decode module consumes x_n as its first input and samples y_1.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.model.kv.dense import DenseKV
from pshare_jax.sampling.params import GREEDY, SamplingParams
from pshare_jax.sampling.sample import Adjustments, sample
from pshare_jax.share.boundary import next_position
from pshare_jax.share.factorize import SharedModel
from pshare_jax.share.model import Model
from pshare_jax.text.grammar import Grammar, GrammarCompiler


@dataclass(frozen=True)
class Rollout:
    """The result of one generation: new ids, the smallest gap between the two best scores of any step, and logprobs.

    A test that compares two runs draws another prompt if `smallest_gap` is under 1e-4, so that the ids are exactly
    equal. `logprobs` are the log-softmax of the raw logits at each new id.
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
    grammar: Grammar | None = None,
) -> list[int]:
    """The new token ids, including the end token if one was chosen. `stop_ids` defaults to the model's end tokens.

    No stop id is chosen among the first `min_tokens` new ids. The answer follows `grammar`, if there is one. With
    `response_start` k, prompt_ids[k:] are the start of the answer: the base encodes prompt_ids[:k-1], and the decode module
    continues from its own KV of the rest.
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
        grammar=grammar,
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
    grammar: Grammar | None = None,
) -> Rollout:
    """`generate` with gap and logprobs; a prompt and answer longer than the model's context raise `PshareError`."""
    if len(prompt_ids) == 0:
        raise PshareError("the prompt must have at least one token.")
    if max_new_tokens < 0:
        raise PshareError(f"max_new_tokens must be at least 0, not {max_new_tokens}.")
    if len(prompt_ids) + max_new_tokens > shared.config.max_len:
        raise PshareError(
            f"the model's maximum context length is {shared.config.max_len} tokens, but the prompt has "
            f"{len(prompt_ids)} and max_new_tokens is {max_new_tokens}."
        )
    last = next_position(len(prompt_ids))
    context = list(prompt_ids[:last])
    split = shared.split(task, prompt_ids, response_start)
    kv = shared.transfer(shared.prefill([context[: split.base_len]]))
    if split.base_len < len(context):
        kv = shared.decode(task, [context[split.base_len :]], kv, active=split.active)[1]
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
        grammar=grammar,
        begun=prompt_ids[len(prompt_ids) if response_start is None else response_start :],
        active=split.active,
    )


def score(
    shared: SharedModel, task: str, ids: Sequence[int], *, response_start: int | None = None
) -> list[float | None]:
    """The log-probability that the task's module gives each id after all earlier ids; None for the first.

    Each id is scored as the first token of an answer: the base encodes all earlier ids but the last, which the module
    consumes. With `response_start` k, ids[k:] are scored as one answer, as in training: the base encodes ids[:k-1], the
    module consumes the rest one after another on its own KV, and the scores before k are None.

    The ids that an activated LoRA's own invocation and what follows predict are scored as one answer too, on the module's KV,
    and all earlier ids by the base's weights, as PEFT computes them.
    """
    scores: list[float | None] = [None] * len(ids)
    split = shared.split(task, ids, response_start)
    kv = shared.prefill([list(ids[: 0 if response_start is None else split.base_len])])
    own = None
    for index in range(1 if response_start is None else split.base_len + 1, len(ids)):
        position = next_position(index)
        before = [[ids[position]]]
        if position < split.base_len:
            logits, _ = shared.decode(task, before, shared.transfer(kv), active=False)
            kv = shared.prefill(before, kv)
        else:
            own = shared.transfer(kv) if own is None else own
            logits, own = shared.decode(task, before, own, active=split.active)
        if index >= (response_start or 1):
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
    grammar: Grammar | None = None,
    begun: Sequence[int] = (),
    active: bool = True,
) -> Rollout:
    """Generate from a context's KV on the decode mesh; `kv` stays unchanged, so that other tasks can start from it.

    `begun` are the prompt's last tokens that are the beginning of the answer that follows `grammar`.

    `context_ids` are the tokens whose KV `kv` holds; only a repetition penalty needs them, and without them it raises
    `PshareError`. An activated LoRA that is not `active` leaves the answer to the base's weights.
    """
    if sampling.repetition_penalty != 1 and len(context_ids) != kv.length:
        raise PshareError(
            f"repetition_penalty needs the {kv.length} tokens of the KV in context_ids, which has {len(context_ids)}."
        )
    prompt = [*context_ids, last_prompt_id]
    stops = shared.model.stop_ids if stop_ids is None else stop_ids
    follows = None if grammar is None else Follower(shared.model, grammar, begun)
    kv = kv.copy(kv.length + max_new_tokens)
    ids: list[int] = []
    logprobs: list[float] = []
    smallest_gap = float("inf")
    while len(ids) < max_new_tokens:
        step, kv = shared.decode(task, [[ids[-1] if ids else last_prompt_id]], kv, donate=True, active=active)
        logits = step[0, -1]
        banned = stops if len(ids) < min_tokens else ()
        if follows is not None:
            banned = follows.banned(stops, len(ids) < min_tokens)
        changes = adjustments(sampling, prompt, ids, banned, logits.shape[0])
        chosen, gap = sample(logits, sampling, kv.length, changes)
        token, smallest_gap = int(chosen), min(smallest_gap, float(gap))
        ids.append(token)
        logprobs.append(float(log_softmax(np.asarray(logits, np.float64))[token]))
        if token in stops or (follows is not None and follows.ends_with(token, stops)):
            break
    return Rollout(ids, smallest_gap, logprobs)


class Follower:
    """A grammar followed token by token, with the ids that may not come next written out."""

    def __init__(self, model: Model, grammar: Grammar, begun: Sequence[int]):
        """Raises PshareError for a grammar that cannot be compiled."""
        size = model.config.vocab_size
        self._matcher = GrammarCompiler(model.tokenizer, size).prototype(grammar)
        self._matcher.consume_tokens(list(begun))

    def banned(self, stops: Collection[int], too_short: bool) -> list[int]:
        """The ids that may not come next; stop ids may where the answer may end, unless it is too short and may go on."""
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[:-1] > 0
        inside = [token for token in stops if 0 <= token < len(allowed)]
        allowed[inside] = False
        if self._matcher.is_accepting() and not (too_short and allowed.any()):
            allowed[inside] = True
        return np.flatnonzero(~allowed).tolist()

    def ends_with(self, token: int, stops: Collection[int]) -> bool:
        """Adds a token; whether nothing but a stop id, if there is one, may follow it."""
        self._matcher.consume_tokens([token])
        if self._matcher.is_stopped() or stops:
            return self._matcher.is_stopped()
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[:-1]
        return self._matcher.is_accepting() and not allowed.any()


def adjustments(
    sampling: SamplingParams, prompt: Sequence[int], answer: Sequence[int], banned: Collection[int], size: int
) -> Adjustments | None:
    """The changes to the next token's scores, computed from all tokens so far; None if the scores stay unchanged."""
    if not sampling.needs_adjustments and not banned:
        return None
    sampling.check_vocabulary(size)
    bias, repeated = np.zeros((1, size), np.float32), np.zeros((1, size), bool)
    for token in {token for token, _ in sampling.logit_bias}:
        bias[0, token] = sum(value for named, value in sampling.logit_bias if named == token)
    frequency, presence = np.float32(sampling.frequency_penalty), np.float32(sampling.presence_penalty)
    for token in set(answer):
        bias[0, token] -= frequency * np.float32(answer.count(token)) + presence
    # A stop id outside the vocabulary is never chosen anyway.
    bias[0, [token for token in banned if 0 <= token < size]] = -np.inf
    if sampling.repetition_penalty != 1:
        repeated[0, [*prompt, *answer]] = True
    return Adjustments(bias, repeated)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities `[V]` of logits `[V]`, in their dtype."""
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
