"""The plain loop equals transformers and PEFT, token for token; the tiny models notice a wrong page of KV.

Prompts are redrawn until the two best scores are never closer than 1e-4, so that equality of greedy ids is exact.
Decode modules are compared with transformers' own decode on the base's cache.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import hf_decode_on_base, hf_greedy, load_hf, load_peft
from tiny import FAMILIES, random_tokens, tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.share.factorize import CHUNK
from pshare_jax.share.generate import Rollout

# One token to just past a chunk, with page and bucket borders and the empty prefill.
LENGTHS = (1, 2, 15, 16, 17, 18, 40, CHUNK, CHUNK + 1, CHUNK + 2)
NEW = 6
SMALL = {
    "llama": {"num_hidden_layers": 2},
    "qwen3": {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
PAGE = 16


@dataclass
class Made:
    """A tiny base with a full and a LoRA task, here and in transformers."""

    folder: Path
    modules: dict[str, Path]
    shared: ps.SharedModel
    hf: Any


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory) -> Made:
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    folder = tiny_folder(family, root / "base", max_position_embeddings=1024, **SMALL[family])
    modules = {kind: tiny_module(folder, root / kind, kind=kind) for kind in ("full", "lora")}
    shared = ps.factorize(ps.load(folder))
    shared.add_task("base", "base")
    for name, path in modules.items():
        shared.add_task(name, path)
    return Made(folder, modules, shared, load_hf(folder))


def clear_prompts(shared: ps.SharedModel, task: str, length: int) -> Iterator[tuple[list[int], Rollout]]:
    """Random prompts of a length and their rollouts, without near-ties."""
    for seed in range(length, length + 1000):
        prompt = random_tokens(seed, length).tolist()
        rollout = ps.rollout(shared, task, prompt, max_new_tokens=NEW, stop_ids=())
        if rollout.smallest_gap > 1e-4:
            yield prompt, rollout


@pytest.mark.parametrize("length", LENGTHS)
def test_base_equals_transformers(made, length):
    prompt, rollout = next(clear_prompts(made.shared, "base", length))
    assert rollout.ids == hf_greedy(made.hf, prompt, NEW)


def test_transformers_decode_on_a_cache_of_every_key_is_its_plain_forward(made):
    """The reference of the next two tests is correct, sliding windows included."""
    prompt, rollout = next(clear_prompts(made.shared, "base", 40))
    assert hf_decode_on_base(made.hf, made.hf, prompt, NEW) == rollout.ids


@pytest.mark.parametrize("length", [1, 2, 17, 40, CHUNK + 2])
def test_full_module_equals_transformers(made, length):
    decoder = load_hf(made.modules["full"])
    prompt, rollout = next(clear_prompts(made.shared, "full", length))
    assert rollout.ids == hf_decode_on_base(made.hf, decoder, prompt, NEW)


@pytest.mark.parametrize("length", [1, 40])
def test_lora_module_equals_peft(made, length):
    decoder = load_peft(made.folder, made.modules["lora"])
    prompt, rollout = next(clear_prompts(made.shared, "lora", length))
    assert rollout.ids == hf_decode_on_base(made.hf, decoder, prompt, NEW)


def test_tasks_differ_from_the_base_and_from_prefilling_themselves(made):
    """The two tests above can fail."""
    own = ps.factorize(ps.load(made.modules["full"]))
    own.add_task("own", "base")
    prompt = random_tokens(1, 40).tolist()
    outputs = [
        ps.generate(made.shared, task, prompt, max_new_tokens=NEW, stop_ids=()) for task in ("base", "full", "lora")
    ]
    outputs.append(ps.generate(own, "own", prompt, max_new_tokens=NEW, stop_ids=()))
    assert len({tuple(ids) for ids in outputs}) == 4


def test_stop_ids(made):
    prompt = random_tokens(2, 20).tolist()
    ids = ps.generate(made.shared, "base", prompt, max_new_tokens=NEW, stop_ids=())
    assert len(ids) == NEW
    third = ids[2]
    end = ids.index(third) + 1
    assert ps.generate(made.shared, "base", prompt, max_new_tokens=NEW, stop_ids=[third]) == ids[:end]
    ending = dataclasses.replace(made.shared.model, stop_ids=frozenset({third}))
    shared = ps.factorize(ending)
    shared.add_task("base", "base")
    assert ps.generate(shared, "base", prompt, max_new_tokens=NEW) == ids[:end]
    assert ps.generate(shared, "base", prompt, max_new_tokens=NEW, stop_ids=()) == ids
    assert ps.generate(shared, "base", prompt, max_new_tokens=0) == []


def test_one_context_for_several_tasks(made):
    """`continue_from` does not change the KV, so all tasks start from the same arrays."""
    prompt = random_tokens(3, 33).tolist()
    kv = made.shared.transfer(made.shared.prefill([prompt[:-1]]))
    before = [[np.array(x) for x in layer] for layer in kv.layers]
    for task in ("full", "base", "lora", "full"):
        expected = ps.generate(made.shared, task, prompt, max_new_tokens=NEW, stop_ids=())
        assert ps.continue_from(made.shared, task, kv, prompt[-1], NEW, stop_ids=()).ids == expected
    for layer, old in zip(kv.layers, before, strict=True):
        np.testing.assert_array_equal(layer[0], old[0])
        np.testing.assert_array_equal(layer[1], old[1])


def test_sampling_is_a_function_of_seed_and_choice(made):
    prompt = random_tokens(4, 20).tolist()

    def draw(**changes: Any) -> list[int]:
        sampling = ps.SamplingParams(**{"temperature": 1.5, "seed": 7, **changes})
        return ps.generate(made.shared, "base", prompt, max_new_tokens=NEW, sampling=sampling, stop_ids=())

    assert draw() == draw()
    assert len({tuple(draw(choice=choice)) for choice in range(4)}) == 4
    assert draw(seed=8) != draw()
    assert draw(top_k=1) == ps.generate(made.shared, "base", prompt, max_new_tokens=NEW, stop_ids=())


def forced_logits(shared: ps.SharedModel, prompt: list[int], ids: list[int]) -> np.ndarray:
    """Float64 logits `[len(ids), V]` of the step that chose each new id, computed in one step."""
    kv = shared.transfer(shared.prefill([prompt[:-1]]))
    return np.asarray(shared.decode("base", [[prompt[-1], *ids[:-1]]], kv)[0][0], np.float64)


PENALTIES: tuple[dict[str, Any], ...] = (
    {"presence_penalty": 10.3, "logit_bias": ((7, 40.0), (9, 35.0))},
    {"frequency_penalty": 7.1, "logit_bias": ((7, 40.0), (9, 35.0))},
    {"frequency_penalty": -6.0},
    {"presence_penalty": -6.0},
    {"repetition_penalty": 4.0},
    {"repetition_penalty": 0.3},
    {"logit_bias": ((7, 30.0), (9, 29.5))},
    # So large that the logits of 7 and 9 do not matter: 9 follows 7 only because both penalties apply. After both, a
    # prompt token would be next without the repetition penalty.
    {
        "presence_penalty": 100.0,
        "frequency_penalty": 200.0,
        "repetition_penalty": 4.0,
        "logit_bias": ((7, 600.0), (9, 200.0), (9, 150.0)),
    },
)


@pytest.mark.parametrize("options", PENALTIES)
def test_penalties(made, options):
    """Greedy ids have the best adjusted scores, recomputed in NumPy from the logits of the whole answer."""
    prompt, sampling = [7, *random_tokens(6, 250).tolist()], ps.SamplingParams(**options)
    rollout = ps.rollout(made.shared, "base", prompt, max_new_tokens=12, sampling=sampling, stop_ids=())
    for i, logits in enumerate(forced_logits(made.shared, prompt, rollout.ids)):
        scores = logits.copy()
        for token in range(len(scores)):
            if token in prompt or token in rollout.ids[:i]:
                factor = sampling.repetition_penalty
                scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
            count = rollout.ids[:i].count(token)
            scores[token] -= sampling.frequency_penalty * count + sampling.presence_penalty * (count > 0)
            scores[token] += sum(bias for named, bias in sampling.logit_bias if named == token)
        assert rollout.smallest_gap > 1e-4
        assert rollout.ids[i] == scores.argmax()
        assert np.sort(scores)[-1] - np.sort(scores)[-2] > rollout.smallest_gap - 1e-4
    for name in options:
        without = ps.SamplingParams(**{key: value for key, value in options.items() if key != name})
        assert rollout.ids != ps.generate(
            made.shared, "base", prompt, max_new_tokens=12, sampling=without, stop_ids=()
        ), f"{name} has no effect here"


def test_logprobs_are_those_of_the_raw_logits(made):
    prompt = random_tokens(7, 25).tolist()
    sampling = ps.SamplingParams(1.3, top_k=9, seed=2, frequency_penalty=1.5, repetition_penalty=1.6)
    rollout = ps.rollout(made.shared, "base", prompt, max_new_tokens=8, sampling=sampling, stop_ids=())
    logits = forced_logits(made.shared, prompt, rollout.ids)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(rollout.logprobs, expected[range(8), rollout.ids], rtol=0, atol=1e-4)


def test_min_tokens(made):
    """Before `min_tokens` the best token that is not a stop id is chosen."""
    prompt = random_tokens(8, 20).tolist()

    def ids(stops: Any, min_tokens: int = 0) -> list[int]:
        return ps.generate(made.shared, "base", prompt, max_new_tokens=NEW, stop_ids=stops, min_tokens=min_tokens)

    first = ids(())[0]
    assert ids([first]) == [first]
    held_back = ids([first, -1, 10**9], NEW - 1)
    assert first not in held_back[: NEW - 1]
    assert len(held_back) == NEW
    logits = forced_logits(made.shared, prompt, held_back)
    logits[:, first] = -np.inf
    assert held_back[:-1] == logits.argmax(-1).tolist()[:-1]
    assert ids([], NEW) == ids(())
    assert ids([first], 1)[0] == held_back[0]


def test_a_repetition_penalty_needs_the_context(made):
    prompt, sampling = random_tokens(9, 20).tolist(), ps.SamplingParams(repetition_penalty=3.0)
    kv = made.shared.transfer(made.shared.prefill([prompt[:-1]]))
    with pytest.raises(PshareError, match=r"19 tokens.* context_ids"):
        ps.continue_from(made.shared, "base", kv, prompt[-1], NEW, sampling)
    given = ps.continue_from(made.shared, "base", kv, prompt[-1], NEW, sampling, (), context_ids=prompt[:-1])
    assert given == ps.rollout(made.shared, "base", prompt, max_new_tokens=NEW, sampling=sampling, stop_ids=())


def test_bias_of_an_unknown_token(made):
    with pytest.raises(PshareError, match=r"logit_bias.* 320\b.* 319"):
        ps.generate(made.shared, "base", [1], max_new_tokens=1, sampling=ps.SamplingParams(logit_bias=((320, 1.0),)))


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([], 1, "at least one token"),
        ([1], -1, "max_new_tokens"),
        ([1] * 1020, 5, "1024 .* 1020 .* 5"),
        ([1, 320], 1, "0 to 319"),
        ([320, 1], 1, "0 to 319"),
        ([-1], 1, "0 to 319"),
    ],
)
def test_bad_prompts(made, prompt, count, message):
    with pytest.raises(PshareError, match=message):
        ps.generate(made.shared, "base", prompt, max_new_tokens=count)


def test_the_whole_context_can_be_used(tmp_path):
    shared = ps.factorize(ps.load(tiny_folder("llama", tmp_path, num_hidden_layers=1, max_position_embeddings=40)))
    shared.add_task("base", "base")
    prompt = random_tokens(5, 37).tolist()
    assert len(ps.generate(shared, "base", prompt, max_new_tokens=3, stop_ids=())) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_notice_every_page(family, tiny_folders):
    """Changing any page of a prompt, or dropping it from the KV, changes the greedy output (cases.md, Words)."""
    shared = ps.factorize(ps.load(tiny_folders[family]))
    shared.add_task("base", "base")

    def continued(tokens: list[int], dropped: slice = slice(0, 0)) -> list[int]:
        kv = shared.prefill([tokens[:-1]])
        layers = jax.tree.map(np.array, kv.layers)
        for array in jax.tree.leaves(layers):
            array[:, :, dropped] = 0
        changed = dataclasses.replace(kv, layers=jax.tree.map(jnp.asarray, layers))
        return ps.continue_from(shared, "base", changed, tokens[-1], 16, stop_ids=()).ids

    for seed in range(3):
        prompt = random_tokens(seed, 4 * PAGE).tolist()
        right = continued(prompt)
        assert right == continued(prompt)
        for start in range(0, len(prompt), PAGE):
            # The decode module consumes the last prompt token, so it stays.
            page = slice(start, min(start + PAGE, len(prompt) - 1))
            other = [*prompt]
            other[page] = random_tokens(100 + start, page.stop - page.start).tolist()
            assert continued(other) != right, f"prompt {seed}: page at {start} changed"
            assert continued(prompt, page) != right, f"prompt {seed}: page at {start} dropped"
