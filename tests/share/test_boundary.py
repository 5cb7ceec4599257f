"""The boundary rule: the default, begun answers, and the invocation of an activated LoRA."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.errors import PshareError
from pshare_jax.share.boundary import Boundary, Split, base_len

pytestmark = pytest.mark.host
tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(tokens, st.integers(-2, 14))
def test_without_an_invocation_it_is_the_default_rule(prompt, start):
    assert Boundary().split(prompt) == Split(base_len(len(prompt)))
    if 1 <= start < len(prompt):
        assert Boundary().split(prompt, start) == Split(base_len(len(prompt), start))


@given(tokens, st.lists(st.integers(0, 2), min_size=1, max_size=3), st.none() | st.integers(1, 11))
def test_the_last_invocation_before_the_answer_is_the_boundary(prompt, invocation, start):
    if start is not None and start >= len(prompt):
        start = None
    # A plain search over all places, from the front.
    places = [at for at in range(len(prompt)) if prompt[at : at + len(invocation)] == invocation]
    places = [at for at in places if start is None or at + len(invocation) <= start]
    split = Boundary(tuple(invocation)).split(tuple(prompt), start)
    assert split.active == bool(places)
    assert split.base_len == (places[-1] if places else base_len(len(prompt), start))
    assert 0 <= split.base_len <= base_len(len(prompt), start)


@pytest.mark.parametrize("boundary", [Boundary(), Boundary((1,))])
@pytest.mark.parametrize("start", [0, 3, -1])
def test_a_start_outside_the_prompt_is_refused(boundary, start):
    with pytest.raises(PshareError, match=rf"response_start.* 3 .*{start}\."):
        boundary.split((1, 2, 1), start)
