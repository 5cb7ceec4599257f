"""The sampler's costs: what a step sends and fetches, and that its programs are those that were compiled before."""

from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from pshare_jax.engine.failures import RowFailed
from pshare_jax.engine.request import Request
from pshare_jax.engine.sampler import Sampler, SamplerRows
from pshare_jax.engine.sequence import DecodeProgress, Sequence
from pshare_jax.mesh import make_mesh, replicated
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.sampling.step_rows import ROW
from pshare_jax.server.compile_counter import count_compilations

VOCAB, SLOTS = 20_000, 4
BUSY = SamplingParams(0.8, frequency_penalty=0.4, repetition_penalty=1.2, logit_bias=((7, 2.0),), seed=1)


def fake(sampling: SamplingParams, ids: tuple[int, ...] = (), **fields: Any) -> Sequence:
    """A sequence with what the sampler reads of it."""
    sequence = Sequence.__new__(Sequence)
    sequence.request = Request("a", "t", (1, 2, 3), 10, sampling, **fields)
    sequence.matcher, sequence.decode = None, DecodeProgress(completion_ids=list(ids))
    return sequence


def seated(sampler: Sampler, *sequences: Any) -> SamplerRows:
    rows = sampler.new_rows(SLOTS)
    for slot, sequence in enumerate(sequences):
        rows.join(slot, sequence)
    return rows


def logits(sampler: Sampler, num_rows: int) -> Any:
    values = np.random.default_rng(0).normal(0, 3, (num_rows, VOCAB)).astype(np.float32)
    return jax.device_put(values, replicated(sampler.mesh))


def sent(rows: SamplerRows, *arguments: Any) -> list[np.ndarray]:
    """The host arrays of a sampling call."""
    given: list[np.ndarray] = []
    sampler = rows._sampler
    sample = sampler.calls.sample

    def noted(*args: Any) -> Any:
        given.extend(leaf for leaf in jax.tree.leaves(args) if not isinstance(leaf, jax.Array))
        return sample(*args)

    sampler.calls = sampler.calls._replace(sample=noted)
    placed = mock.patch.object(sampler, "on_device", side_effect=AssertionError("nothing more is sent"))
    sampler.no_masks(arguments[-1])
    with placed:
        rows.prepare(*arguments)(logits(sampler, arguments[-1])).fetch()
    sampler.calls = sampler.calls._replace(sample=sample)
    return given


@pytest.mark.parametrize("sampling", [SamplingParams(), BUSY])
def test_a_step_sends_a_few_words_a_row(sampling):
    sampler = Sampler(make_mesh([0]), VOCAB, SLOTS)
    sequence = fake(sampling, stop_ids=frozenset({5}), min_tokens=3, logprobs=2)
    rows = seated(sampler, sequence, sequence, sequence)
    given = sent(rows, [sequence] * 3, [0, 1, 2], [3, 3, 3], 4)
    assert sum(array.nbytes for array in given) == 4 * ROW.itemsize == 4 * 64


@pytest.mark.parametrize(("logprobs", "num_arrays"), [(None, 1), (2, 4)])
def test_a_step_is_fetched_once(logprobs, num_arrays):
    sampler = Sampler(make_mesh([0]), VOCAB, SLOTS)
    sequence = fake(BUSY, logprobs=logprobs)
    pending = seated(sampler, sequence).prepare([sequence], [0], [3], 1)(logits(sampler, 1))
    with mock.patch.object(jax, "device_get", wraps=jax.device_get) as fetched:
        choice = pending.fetch()
        token_id, reported = choice(0, sequence)
    assert fetched.call_count == 1
    assert len(fetched.call_args.args[0]) == num_arrays
    assert 0 <= token_id < VOCAB
    assert (reported is None) == (logprobs is None)


def test_a_choice_does_not_wait():
    """Neither the call nor the slot's next input needs the result on the host."""
    sampler = Sampler(make_mesh([0]), VOCAB, SLOTS)
    sequence = fake(SamplingParams())
    rows = seated(sampler, sequence)
    with mock.patch.object(jax, "device_get", side_effect=AssertionError("waits")):
        pending = [rows.prepare([sequence], [0], [3 + step], 1)(logits(sampler, 1)) for step in range(3)]
    assert [each.fetch()(0, sequence)[0] for each in pending] == [int(np.asarray(rows.tokens)[0])] * 3


def test_rows_go_on_where_an_answer_was():
    """A sequence that takes a slot with tokens gets the tokens that it would have got in its first slot."""
    sampler = Sampler(make_mesh([0]), VOCAB, SLOTS)
    first, given = fake(BUSY), logits(sampler, 1)
    rows = seated(sampler, fake(BUSY, (4, 4)), first)
    for step in range(6):
        chosen = rows.prepare([first], [1], [3 + step], 1)(given).fetch()(0, first)[0]
        first.decode.completion_ids.append(chosen)
    moved = seated(sampler, fake(BUSY, tuple(first.decode.completion_ids[:4])))
    for step in (4, 5):
        chosen = moved.prepare([first], [0], [3 + step], 1)(given).fetch()(0, first)[0]
        assert chosen == first.decode.completion_ids[step]


@pytest.mark.parametrize("devices", [[0], [2, 3]])
def test_what_runs_is_what_was_lowered(devices):
    sampler = Sampler(make_mesh(devices), VOCAB + len(devices), SLOTS)
    sampler.lower(2).compile()
    sampler.lower_join().compile()
    values = jax.device_put(np.ones((2, VOCAB + len(devices)), np.float32), replicated(sampler.mesh))
    before = count_compilations().count
    rows = sampler.new_rows(SLOTS)
    for sequence in (fake(SamplingParams()), fake(BUSY, (1, 2) * 400, logprobs=3)):
        rows.join(1, sequence)
        for step in range(2):
            rows.prepare([sequence], [1], [3 + step], 2)(values).fetch()
    assert rows.tokens.sharding == replicated(sampler.mesh)
    assert count_compilations().count == before


def test_a_bias_outside_the_vocabulary_fails_its_row():
    sampler = Sampler(make_mesh([0]), VOCAB, SLOTS)
    with pytest.raises(RowFailed):
        seated(sampler, fake(SamplingParams(logit_bias=((VOCAB, 1.0),))))
