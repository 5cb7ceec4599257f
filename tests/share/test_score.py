"""The scoring oracle equals transformers: each token's log-probability as the first of an answer or within an answer."""

import numpy as np
import pytest
import torch
from reference import hf_logits, load_hf
from tiny import FAMILIES, random_tokens, tiny_folder, tiny_module
from transformers import DynamicCache

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.share.generate import log_softmax

LENGTH = 21


def assert_scores(ours, theirs, first):
    assert ours[:first] == [None] * first
    np.testing.assert_allclose(ours[first:], theirs, atol=1e-4, rtol=0)


def of_targets(logits, ids, first):
    """Log-probabilities of ids[first:] from the logits before each."""
    rows = np.asarray(logits, np.float64)
    return [log_softmax(row)[token] for row, token in zip(rows[-(len(ids) - first) :], ids[first:], strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_scores_as_transformers_forward_pass(family, tiny_folders):
    shared = ps.factorize(ps.load(tiny_folders[family]))
    shared.add_task("base", "base")
    ids = random_tokens(1, LENGTH).tolist()
    logits = hf_logits(load_hf(tiny_folders[family]), np.array([ids]))[0, :-1]
    for start in (None, 5):
        assert_scores(
            ps.score(shared, "base", ids, response_start=start), of_targets(logits, ids, start or 1), start or 1
        )


def test_a_module_scores_on_the_bases_kv(tmp_path):
    base = tiny_folder("llama", tmp_path / "base")
    module = tiny_module(base, tmp_path / "full")
    shared = ps.factorize(ps.load(base))
    shared.add_task("full", module)
    hf_base, hf_module = load_hf(base), load_hf(module)
    ids = random_tokens(2, LENGTH).tolist()

    def consumed(num_base, end):
        """The module's logits for ids[num_base:end] on the base's KV of ids[:num_base]."""
        cache = DynamicCache()
        with torch.no_grad():
            if num_base:
                hf_base(torch.tensor([ids[:num_base]]), cache=cache, use_cache=True)
            return hf_module(torch.tensor([ids[num_base:end]]), cache=cache, use_cache=True).logits[0].numpy()

    plain = [of_targets(consumed(index - 1, index), ids[: index + 1], index)[0] for index in range(1, LENGTH)]
    assert_scores(ps.score(shared, "full", ids), plain, 1)
    for start in (1, 2, 9, LENGTH - 1):
        begun = of_targets(consumed(start - 1, LENGTH - 1), ids, start)
        assert_scores(ps.score(shared, "full", ids, response_start=start), begun, start)
    # The two differ, because an answer is scored on the module's own KV.
    assert abs(np.array(plain[9:]) - of_targets(consumed(8, LENGTH - 1), ids, 10)).max() > 1e-3


def test_continuing_an_answer_equals_generating_it_whole(tmp_path):
    base = tiny_folder("llama", tmp_path / "base")
    shared = ps.factorize(ps.load(base))
    shared.add_task("lora", tiny_module(base, tmp_path / "lora", kind="lora"))
    prompt = random_tokens(3, 18).tolist()
    whole = ps.rollout(shared, "lora", prompt, max_new_tokens=12, stop_ids=())
    assert whole.smallest_gap > 1e-4
    for cut in (1, 5, 11):
        begun = ps.generate(
            shared, "lora", [*prompt, *whole.ids[:cut]], max_new_tokens=12 - cut, stop_ids=(), response_start=18
        )
        assert begun == whole.ids[cut:]
    ids = [*prompt, *whole.ids]
    assert_scores(ps.score(shared, "lora", ids, response_start=18), whole.logprobs, 18)


@pytest.mark.parametrize(("start", "length"), [(0, 5), (-1, 5), (5, 5), (1, 1)])
def test_response_start_outside_the_prompt(tiny_folders, start, length):
    shared = ps.factorize(ps.load(tiny_folders["llama"]))
    shared.add_task("base", "base")
    with pytest.raises(PshareError, match=rf"response_start.* {length} .*{start}\."):
        ps.score(shared, "base", [1] * length, response_start=start)
    with pytest.raises(PshareError, match=rf"response_start.* {length} .*{start}\."):
        ps.generate(shared, "base", [1] * length, max_new_tokens=1, response_start=start)
