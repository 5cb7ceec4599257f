"""Sampling parameters: their limits, and the rows of a batch."""

from typing import Any

import numpy as np
import pytest

from pshare_jax.errors import PshareError
from pshare_jax.sampling.params import SamplingParams, sampling_rows

pytestmark = pytest.mark.host


def test_rows_are_padded_with_greedy_rows():
    params = SamplingParams(0.7, 5, 0.9, 0.1, seed=-2, choice=3, repetition_penalty=1.2)
    rows = sampling_rows([params, SamplingParams(9.9999999e-6)], [17, 4], 4)
    assert rows.temperature.tolist() == [np.float32(0.7), 0, 0, 0]
    assert rows.top_k.tolist() == [5, 0, 0, 0]
    assert rows.top_p.tolist() == [np.float32(0.9), 1, 1, 1]
    assert rows.min_p.tolist() == [np.float32(0.1), 0, 0, 0]
    assert rows.seed.tolist() == [[2**32 - 1, 2**32 - 2], [0, 0], [0, 0], [0, 0]]
    assert rows.choice.tolist() == [3, 0, 0, 0]
    assert rows.position.tolist() == [17, 4, 0, 0]
    assert rows.repetition_penalty.tolist() == [np.float32(1.2), 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"repetition_penalty": 0.0}, "0.0"),
        ({"repetition_penalty": float("nan")}, "nan"),
        ({"repetition_penalty": float("inf")}, "inf"),
        ({"presence_penalty": float("nan")}, "nan"),
        ({"frequency_penalty": -float("inf")}, "-inf"),
        ({"logit_bias": ((4, float("inf")),)}, "token 4 .*inf"),
        ({"logit_bias": ((4, float("nan")),)}, "token 4 .*nan"),
    ],
)
def test_parameters_out_of_range_are_refused(options: dict[str, Any], value):
    with pytest.raises(PshareError, match=rf"^{next(iter(options))}.*{value}"):
        SamplingParams(**options)


def test_parameters_that_need_adjustments():
    assert not SamplingParams(0.7, 5, 0.9, 0.1, 3, 2).needs_adjustments
    assert SamplingParams(presence_penalty=-0.1).needs_adjustments
    assert SamplingParams(frequency_penalty=0.1).needs_adjustments
    assert SamplingParams(repetition_penalty=0.9).needs_adjustments
    assert SamplingParams(logit_bias=((1, 0.5),)).needs_adjustments
