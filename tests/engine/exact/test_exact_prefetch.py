"""Prefetches on real engines over tiny models: the answers behind them are the plain loop's, and compute only their tails."""

import numpy as np
import pytest
from tiny_engine import Engines, prefill_tokens

from pshare_jax.engine.config import placed
from pshare_jax.engine.request import Hint

PAGE = 4


@pytest.mark.parametrize("place", ["split", pytest.param("colocated", marks=pytest.mark.slow)])
def test_answers_behind_a_prefetch_are_right_and_compute_their_tails(sources, place):
    device = 1 if place == "split" else 0
    world = Engines(sources[0], {"chat": "base"}, placed([[0]], [[device]]), page_size=PAGE)
    draw = np.random.default_rng(3)
    for length in (1, 5, 30):
        request = world.clear(draw, "chat", length)
        prefetch = world.request("chat", request.prompt, hint=Hint(prefetch=True))
        full = (length - 1) // PAGE * PAGE
        before = prefill_tokens(world.engine)
        (answer,) = world.run(prefetch)
        assert (answer.ids, answer.events[-1].finish_reason, answer.cached_tokens) == ([], "stop", 0)
        assert prefill_tokens(world.engine) - before == full
        (answer,) = world.check(request)
        assert answer.cached_tokens == full
        assert prefill_tokens(world.engine) - before == length - 1
