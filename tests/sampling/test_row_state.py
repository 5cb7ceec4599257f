"""The state of row slots gives every row, bit by bit, what a computation from its whole answer gives it alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.sampling import row_state
from pshare_jax.sampling.params import SamplingParams, all_allowed
from pshare_jax.sampling.row_state import STARTED, empty_state, sample_slots, slot_starts, start_slot
from pshare_jax.sampling.sample import Adjustments, sample
from pshare_jax.sampling.step_rows import ROW, packed, row_of, unpacked
from pshare_jax.share.generate import adjustments

VOCAB, SLOTS = 70, 4
start_jitted, sample_jitted = jax.jit(start_slot), jax.jit(sample_slots)


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Unusual values, each option often off."""
    biased = rng.integers(0, VOCAB, rng.integers(0, 6)).tolist()
    return SamplingParams(
        temperature=float(rng.choice([0, 0.31, 1.0, 2.7])),
        top_k=int(rng.choice([0, 0, 5])),
        top_p=float(rng.choice([1, 1, 0.93])),
        seed=int(rng.integers(-(1 << 63), 1 << 63)),
        presence_penalty=float(rng.choice([0, 0, 0.7, -1.1])),
        frequency_penalty=float(rng.choice([0, 0, 0.3, -0.123])),
        repetition_penalty=float(rng.choice([1, 1, 1.3, 0.6])),
        logit_bias=tuple((token, float(rng.choice([3.3, -100, -np.inf, 0.1]))) for token in biased if token),
    )


class Answer:
    """A sequence in a slot."""

    def __init__(self, rng: np.random.Generator):
        self.prompt = rng.integers(0, VOCAB, rng.integers(1, 20)).tolist()
        self.params, self.ids = random_params(rng), []
        self.banned = rng.integers(1, VOCAB + 9, rng.integers(0, 4)).tolist()
        self.min_tokens = int(rng.integers(0, 5))
        self.masked, self.reported = rng.random() < 0.3, rng.random() < 0.3
        self.ids += rng.integers(0, VOCAB, rng.choice([0, 0, 3, STARTED, 2 * STARTED + 1])).tolist()

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.ids)

    def starts(self, slot: int) -> list[Any]:
        return slot_starts(slot, self.prompt, self.ids, self.params, self.banned, VOCAB)

    def row(self, slot: int) -> Any:
        row = np.array(row_of(self.params, slot, self.masked, self.reported))
        row["position"], row["banned"] = self.position, len(self.ids) < self.min_tokens
        row["adjusted"] |= row["banned"]
        return row[()]

    def alone(self, logits: np.ndarray, mask: np.ndarray) -> int:
        """The token that the oracle's sampler chooses for it."""
        banned = self.banned if len(self.ids) < self.min_tokens else ()
        changes = adjustments(self.params, self.prompt, self.ids, banned, VOCAB)
        changes = changes or Adjustments(np.zeros((1, VOCAB), np.float32), np.zeros((1, VOCAB), bool))
        if self.masked:
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB].astype(bool)
            changes.bias[0, ~allowed] = -np.inf
        return int(sample(jnp.asarray(logits), self.params, self.position, changes)[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32))
def test_equals_each_row_alone(seed):
    """Sequences join in any slot, with tokens or without, leave, and stay out of some steps; slots are used again."""
    rng = np.random.default_rng(seed)
    tokens, state = np.zeros(SLOTS + 1, np.int32), empty_state(SLOTS + 1, VOCAB)
    seated: dict[int, Answer] = {}
    for _ in range(12):
        for slot in rng.permutation(SLOTS)[: rng.integers(0, 3)].tolist():
            seated[slot] = Answer(rng)
            for start in seated[slot].starts(slot):
                tokens, state = start_jitted(tokens, state, start)
            assert tokens[slot] == (seated[slot].ids or seated[slot].prompt)[-1]
        slots = [slot for slot in rng.permutation(SLOTS).tolist() if slot in seated and rng.random() < 0.8]
        num_rows = len(slots) + int(rng.integers(0, 2)) or 1
        logits = np.round(rng.normal(0, 3, (num_rows, VOCAB)), 1).astype(np.float32)
        masks = all_allowed(num_rows, VOCAB)
        masks[:, :2] &= rng.integers(-(1 << 31), 1 << 31, (num_rows, 2), np.int32)
        masks[:, 0] |= 1
        rows = np.array([seated[slot].row(slot) for slot in slots] + [row_of(SamplingParams(), SLOTS)] * num_rows, ROW)
        unmasked = [row for row in range(num_rows) if row >= len(slots) or not seated[slots[row]].masked]
        masks[unmasked] = -1
        before = np.asarray(tokens)
        tokens, state, report = sample_jitted(logits, tokens, state, packed(rows[:num_rows]), masks)
        for row, slot in enumerate(slots):
            answer = seated[slot]
            expected = answer.alone(logits[row], masks[row])
            assert (int(report.ids[row]), int(tokens[slot])) == (expected, expected)
            answer.ids.append(expected)
        rest = [slot for slot in range(SLOTS) if slot not in slots]
        assert np.asarray(tokens)[rest].tolist() == before[rest].tolist()


@pytest.mark.parametrize("num_rows", [1, 3, 17])
def test_scores_of_any_count_are_those_of_the_host(num_rows):
    """A compiler that rounds product and sum only once gives other scores."""
    rng = np.random.default_rng(num_rows)
    params = [
        SamplingParams(frequency_penalty=rng.normal(), presence_penalty=rng.normal(), logit_bias=((3, 0.1), (9, 7.3)))
        for _ in range(num_rows)
    ]
    size = 3000
    logits = rng.normal(0, 3, (num_rows, size)).astype(np.float32)
    state = empty_state(num_rows, size)
    counts = rng.integers(0, rng.choice([2, 50, 1 << 15]), (num_rows, size)).astype(np.int32)
    state = jax.tree.map(jnp.asarray, state._replace(counts=counts))
    for slot, each in enumerate(params):
        start = slot_starts(slot, [1], [], each, (), size)[0]
        state = start_slot(jnp.zeros(num_rows, jnp.int32), state, start)[1]._replace(counts=state.counts)
    step = packed(np.array([row_of(each, slot) for slot, each in enumerate(params)], ROW))
    scores = jax.jit(lambda *given: row_state._adjusted(given[0], unpacked(given[1]), given[2]))(logits, step, state)
    for row, each in enumerate(params):
        # NumPy rounds every operation.
        frequency, presence = np.float32(each.frequency_penalty), np.float32(each.presence_penalty)
        bias = np.zeros(size, np.float32)
        bias[[3, 9]] = 0.1, 7.3
        bias -= np.where(counts[row] > 0, frequency * counts[row].astype(np.float32) + presence, np.float32(0))
        assert np.asarray(scores[row]).tobytes() == (logits[row] + bias).tobytes()
