"""The compiled dense steps (tests/share tests their values)."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import pshare_jax as ps

FAMILIES = ("llama", "qwen3", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_donated_decode_step_copies_no_cache(tiny_folders, family):
    model = ps.load(tiny_folders[family])
    kv = ps.PrefillModule(model).prefill(np.ones((1, 100), np.int32))
    token, start = np.ones((1, 1), np.int32), jnp.int32(100)
    step: Any = model.steps.decode_donating
    compiled = step.lower(model.params, token, start, kv.layers).compile().as_text()
    shape = ",".join(map(str, kv.layers[0][0].shape))
    assert f"f32[{shape}]" in compiled
    assert re.findall(rf"= f32\[{shape}\]\S* copy\(", compiled) == []


def test_only_a_donated_cache_is_deleted(tiny_folders):
    model = ps.load(tiny_folders["llama"])
    shared = ps.factorize(model)
    shared.add_task("chat", "base")
    kv = shared.prefill([[5, 6, 7]])
    kept, _ = shared.decode("chat", [[8]], kv)
    donated, _ = shared.decode("chat", [[8]], kv, donate=True)
    assert kv.layers[0][0].is_deleted()
    np.testing.assert_array_equal(kept, donated)


def test_equal_architectures_share_their_steps(tiny_folders):
    first, second = ps.load(tiny_folders["llama"]), ps.load(tiny_folders["llama"])
    assert first.steps is second.steps
