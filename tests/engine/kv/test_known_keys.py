"""known_keys.py: a session's next prompt is hashed from where it differs, and nobody else's keys are ever used."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.engine.kv import keys as module
from pshare_jax.engine.kv.keys import page_keys
from pshare_jax.engine.kv.known_keys import START_TOKENS, KnownKeys

pytestmark = pytest.mark.host
SIZE = 4


@pytest.fixture
def hashed(monkeypatch):
    """What is hashed, in its order."""
    data, digest = [], module._digest

    def count(one):
        data.append(one)
        return digest(one)

    monkeypatch.setattr(module, "_digest", count)
    return data


def num_hashed(hashed, known, session, context, salt="", weights="base"):
    """The pages that are hashed for a context whose keys are right."""
    hashed.clear()
    keys = known.keys(session, weights, salt, context)
    num = len(hashed)
    assert keys == page_keys(weights, salt, context, SIZE)
    return num


def test_each_turn_hashes_only_what_is_new(hashed):
    known, context = KnownKeys(SIZE), list(range(100))
    assert num_hashed(hashed, known, "s", context) == 25
    for _ in range(4):
        context += [7] * 10
        new = len(context) // SIZE - (len(context) - 10) // SIZE
        assert num_hashed(hashed, known, "s", context) == new
    assert num_hashed(hashed, known, "s", context) == 0
    assert num_hashed(hashed, known, "s", context[:61]) == 0
    # The whole context is forgotten with its end.
    assert num_hashed(hashed, known, "s", context) == len(context) // SIZE - 15


def test_tasks_that_share_a_context_hash_their_instructions_alone(hashed):
    known, context = KnownKeys(SIZE), list(range(100))
    assert num_hashed(hashed, known, "s", context) == 25
    for task in range(4):
        assert num_hashed(hashed, known, "s", [*context, *[task] * 8]) == 2


@pytest.mark.parametrize("place", [0, 3, 4, 57, 99])
def test_a_changed_token_is_hashed_with_all_behind_it(hashed, place):
    known, context = KnownKeys(SIZE), list(range(100))
    num_hashed(hashed, known, "s", context)
    context[place] = 500
    assert num_hashed(hashed, known, "s", context) == 25 - place // SIZE


def test_tenants_weights_and_sessions_share_nothing(hashed):
    known, context = KnownKeys(SIZE), list(range(100))
    names = [("s", "", "base"), ("s", "salt", "base"), ("s", "", "other"), ("t", "", "base"), (None, "", "base")]
    for session, salt, weights in names:
        assert num_hashed(hashed, known, session, context, salt, weights) == 25
        assert num_hashed(hashed, known, session, context, salt, weights) == 0


def test_without_a_session_contexts_that_begin_alike_follow_one_another(hashed):
    known, start = KnownKeys(SIZE), list(range(START_TOKENS))
    assert num_hashed(hashed, known, None, start + [1] * 8) == START_TOKENS // SIZE + 2
    assert num_hashed(hashed, known, None, start + [1] * 8 + [2] * 8) == 2
    assert num_hashed(hashed, known, None, [5, *start]) == START_TOKENS // SIZE
    assert num_hashed(hashed, known, None, start[:9]) == 2
    assert num_hashed(hashed, known, None, []) == 0


def test_the_least_recent_sessions_are_forgotten(hashed):
    known = KnownKeys(SIZE, max_tokens=100)
    for session in "abc":
        assert num_hashed(hashed, known, session, [1] * 40) == 10
    assert num_hashed(hashed, known, "b", [1] * 40) == 0
    assert num_hashed(hashed, known, "a", [1] * 40) == 10
    assert num_hashed(hashed, known, "b", [1] * 40) == 0
    assert num_hashed(hashed, known, "c", [1] * 40) == 10
    # A context beyond the bound is not kept, nor are others forgotten for it.
    assert num_hashed(hashed, known, "d", [1] * 101) == num_hashed(hashed, known, "d", [1] * 101) == 25
    assert num_hashed(hashed, known, "c", [1] * 40) == num_hashed(hashed, known, "b", [1] * 40) == 0
    assert num_hashed(hashed, known, "e", [1] * 100) == 25
    assert num_hashed(hashed, known, "e", [1] * 100) == 0


calls = st.tuples(st.sampled_from([None, "s"]), st.sampled_from(["", "salt"]), st.lists(st.integers(0, 1), max_size=12))


@settings(deadline=None)
@given(st.lists(calls, max_size=12), st.integers(0, 30))
def test_keys_are_always_those_of_the_prompt(asked, most):
    known = KnownKeys(2, most)
    for session, salt, context in asked:
        assert known.keys(session, "base", salt, tuple(context)) == page_keys("base", salt, context, 2)
        assert known._num_tokens == sum(len(one.tokens) for one in known._contexts.values()) <= most
