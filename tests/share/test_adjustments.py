"""The oracle's adjustments equal a computation token by token, and options that are off change nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.errors import PshareError
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.share.generate import adjustments

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


def computed(prompt, answer, sampling, banned=(), min_tokens=0):
    """The oracle's bias and repeated tokens; None if it changes nothing."""
    changes = adjustments(sampling, prompt, answer, banned if len(answer) < min_tokens else (), VOCAB)
    return changes and (changes.bias[0], changes.repeated[0])


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
    for count in range(len(answer) + 1):
        bias, repeated = expected(prompt, answer[:count], sampling, banned, min_tokens)
        ours = computed(prompt, answer[:count], sampling, banned, min_tokens)
        if ours is None:
            assert not bias.any()
            assert not repeated.any()
        else:
            np.testing.assert_array_equal(ours[0], bias)
            np.testing.assert_array_equal(ours[1], repeated)


def test_nothing_changes_without_options():
    assert computed([1, 2], [4], SamplingParams(0.7, top_k=3), {4}, 0) is None
    for answer in ([], [1]):
        assert computed([1, 2], answer, SamplingParams(), {4}, 2) is not None
    assert computed([1, 2], [1, 1], SamplingParams(), {4}, 2) is None
    assert computed([1], [], SamplingParams(), (), 5) is None
    assert computed([1, 2], [3], SamplingParams(presence_penalty=0.5)) is not None
    assert computed([1], [], SamplingParams(repetition_penalty=1.1)) is not None
    assert computed([1], [], SamplingParams(logit_bias=((3, 0.5),))) is not None


def test_rounding_errors_do_not_accumulate():
    bias, _ = computed([1], [3] * 10_000, SamplingParams(frequency_penalty=0.1)) or ((), ())
    assert bias[3] == np.float32(-1000)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_bias_outside_the_vocabulary_is_refused(token):
    with pytest.raises(PshareError, match=rf"logit_bias\D*{token}\D.* 12\b"):
        computed([1], [], SamplingParams(logit_bias=((token, 1.0),)))
