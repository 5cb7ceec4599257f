"""Token histories equal a computation from scratch, and options that are off take no memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.errors import PshareError
from pshare_jax.sampling.history import TokenHistory
from pshare_jax.sampling.params import SamplingParams

pytestmark = pytest.mark.host
VOCAB = 13
tokens = st.integers(0, VOCAB - 1)
penalties = st.one_of(st.just(0.0), st.floats(-2, 2))


def expected(prompt, answer, sampling, banned, min_tokens):
    """The bias and the repeated tokens, computed per token from the whole completion."""
    bias, repeated = np.zeros(VOCAB, np.float32), np.zeros(VOCAB, bool)
    for token in range(VOCAB):
        added = np.float32(sum(value for named, value in sampling.logit_bias if named == token))
        if token in answer:
            product = np.float32(sampling.frequency_penalty) * np.float32(answer.count(token))
            added -= product + np.float32(sampling.presence_penalty)
        bias[token] = added
        if token in banned and len(answer) < min_tokens:
            bias[token] = -np.inf
        repeated[token] = sampling.repetition_penalty != 1 and (token in prompt or token in answer)
    return bias, repeated


def written(history):
    """The rows after `write`, which were used before."""
    bias, repeated = np.full(VOCAB, 7.5, np.float32), np.ones(VOCAB, bool)
    history.write(bias, repeated)
    return bias, repeated


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(tokens, min_size=1, max_size=6),
    answer=st.lists(tokens, max_size=12),
    presence=penalties,
    frequency=penalties,
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
    logit_bias=st.lists(st.tuples(tokens, st.one_of(st.floats(-100, 100), st.just(-np.inf))), max_size=4),
    banned=st.sets(st.integers(-2, VOCAB + 2), max_size=3),
    min_tokens=st.integers(0, 6),
)
def test_equals_a_computation_from_scratch(
    prompt, answer, presence, frequency, repetition, logit_bias, banned, min_tokens
):
    sampling = SamplingParams(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=tuple(logit_bias),
    )
    history = TokenHistory(prompt, sampling, VOCAB, banned, min_tokens)
    for count in range(len(answer) + 1):
        bias, repeated = expected(prompt, answer[:count], sampling, banned, min_tokens)
        ours_bias, ours_repeated = written(history)
        np.testing.assert_array_equal(ours_bias, bias)
        np.testing.assert_array_equal(ours_repeated, repeated)
        # An inactive history changes nothing.
        assert history.active or not (bias.any() or repeated.any())
        if count < len(answer):
            history.push(answer[count])


def test_active_only_while_adjustments_are_possible():
    plain = TokenHistory([1, 2], SamplingParams(0.7, top_k=3), VOCAB, {4}, 0)
    plain.push(4)
    assert not plain.active
    held_back = TokenHistory([1, 2], SamplingParams(), VOCAB, {4}, 2)
    assert held_back.active
    held_back.push(1)
    assert held_back.active
    held_back.push(1)
    assert not held_back.active
    assert not TokenHistory([1], SamplingParams(), VOCAB, (), 5).active
    assert not TokenHistory([1], SamplingParams(), VOCAB, {VOCAB, -1}, 5).active
    penalized = TokenHistory([1, 2], SamplingParams(presence_penalty=0.5), VOCAB)
    assert not penalized.active
    penalized.push(3)
    assert penalized.active
    assert TokenHistory([1], SamplingParams(repetition_penalty=1.1), VOCAB).active
    assert TokenHistory([1], SamplingParams(logit_bias=((3, 0.5),)), VOCAB).active


def test_arrays_are_allocated_only_for_options_in_use():
    """An array for this vocabulary would not fit into memory."""
    history = TokenHistory([1, 2], SamplingParams(0.7), 1 << 50, {4}, 3)
    history.push(5)
    assert history.active


def test_rounding_errors_do_not_accumulate():
    history = TokenHistory([1], SamplingParams(frequency_penalty=0.1), VOCAB)
    for _ in range(10_000):
        history.push(3)
    assert written(history)[0][3] == np.float32(-1000)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_bias_outside_the_vocabulary_is_refused(token):
    with pytest.raises(PshareError, match=rf"logit_bias\D*{token}\D.* 12\b"):
        TokenHistory([1], SamplingParams(logit_bias=((token, 1.0),)), VOCAB)
