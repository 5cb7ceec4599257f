"""benchmarks/replay.py: agents over small pools cost hardly more prefill than what no pool held."""

import pytest

from benchmarks.replay import PLACEMENTS, replay


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_that_a_pool_holds_are_hardly_prefilled_again(placement):
    """Before pages went back to prefill pools: 2.39 (1+1), 1.00 (colocated) and 1.57 (2+2)."""
    counts = replay(placement, num_seeds=2, num_agents=10, turns=6)
    assert 0 < counts.unheld < counts.asked
    assert counts.ratio <= 1.1
