"""page_keys.py: keys name content, the same in every process, and never the page of the last prompt token."""

import os
import runpy
import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.engine.kv import keys as module
from pshare_jax.engine.kv.keys import page_keys

pytestmark = pytest.mark.host

PAGE_SIZES = (1, 4, 16)


def digests(*args):
    return [key.digest for key in page_keys(*args)]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_every_full_page_has_a_key(page_size):
    for length in range(4 * page_size + 2):
        assert len(page_keys("base", "", range(length), page_size)) == length // page_size


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(0, 40), st.sampled_from(PAGE_SIZES))
def test_a_growing_prompt_continues_its_keys(prompt, cut, page_size):
    whole = page_keys("base", "salt", prompt, page_size)
    earlier = page_keys("base", "salt", prompt[:cut], page_size)
    assert whole[: len(earlier)] == earlier
    assert page_keys("base", "salt", prompt, page_size, earlier) == whole
    assert page_keys("base", "salt", prompt[:cut], page_size, whole) == earlier


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=13, max_size=13), st.integers(0, 11), st.integers(1, 9))
def test_a_changed_token_changes_its_page_and_all_behind(prompt, place, change):
    other = list(prompt)
    other[place] += change
    same = [a == b for a, b in zip(digests("b", "", prompt, 4), digests("b", "", other, 4), strict=True)]
    assert same == [page < place // 4 for page in range(3)]


def test_fields_cannot_run_into_each_other():
    pairs = [
        ("org_1", "2345"),
        ("org_12345", ""),
        ("", "org_12345"),
        ("org_123", "45"),
        ("org_1", "23"),
        ("a\x00", "b"),
    ]
    tokens = [(1, 23), (12, 3), (123, 0), (2345, 0), (0, 2345), (0x31323334, 0)]
    keys = [page_keys(*pair, (*ids, 0), 2)[0] for pair in pairs for ids in tokens]
    assert len({key.digest for key in keys}) == len({key.content for key in keys}) == len(keys)


def test_a_first_page_is_no_later_page():
    # The content of page 1 stands at the start of another prompt: the digests differ although the tokens are equal.
    assert digests("", "", [1, 2, 3, 4, 0], 2)[1] != digests("", "", [3, 4, 0], 2)[0]


def test_half_a_surrogate_pair_is_a_salt_like_others():
    assert digests("b", "\ud800", [1, 2], 1) != digests("b", "\ud801", [1, 2], 1)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_does_not_fit_is_refused(token):
    with pytest.raises(struct.error):
        page_keys("b", "", [token, 0], 1)


def test_equal_in_fresh_interpreters_with_other_hash_seeds():
    code = (
        "import runpy, sys; keys = runpy.run_path(sys.argv[1])['page_keys']('base', 'sält', range(50), 16); print(keys)"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code, str(module.__file__)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    here = runpy.run_path(str(module.__file__))["page_keys"]("base", "sält", range(50), 16)
    assert printed == [str(here)] * 2
    assert [tuple(key) for key in here] == [tuple(key) for key in page_keys("base", "sält", range(50), 16)]
