"""Activated LoRA: a random adapter of PEFT, unmodified, gives PEFT's logits and ids wherever its invocation stands."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft_adapters import peft_greedy, random_adapter
from reference import hf_greedy, hf_logits, load_hf, load_peft
from tiny import CLOSE, assert_close, edit_json, tiny_folder

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.evaluation.evaluate import evaluate
from pshare_jax.evaluation.tasks import Item
from pshare_jax.share.adapter_settings import CONFIG_FILE
from pshare_jax.share.boundary import Boundary

INVOCATION = (7, 300, 7)
TASK = "checker"
COUNT = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Any:
    return World(tmp_path_factory.mktemp("activated"))


class World:
    """A tiny Llama and an activated LoRA in PEFT and here."""

    def __init__(self, folder: Path):
        self.base, self.adapter = tiny_folder("llama", folder / "base"), folder / "adapter"
        random_adapter(self.base, self.adapter, alora_invocation_tokens=list(INVOCATION))
        self.peft, self.plain = load_peft(self.base, self.adapter), load_hf(self.base)
        self.model = ps.load(self.base)
        self.shared = ps.factorize(self.model)
        self.shared.add_task(TASK, self.adapter)
        self.shared.add_task("base", "base")


def prompt_of(*parts: int | None, seed: int = 0) -> list[int]:
    """Random tokens of these numbers; None is the invocation."""
    draw, prompt = np.random.default_rng(seed), []
    for part in parts:
        # Without 7, which begins the invocation.
        prompt += list(INVOCATION) if part is None else draw.integers(8, 300, part).tolist()
    return prompt


PROMPTS = {
    "none": prompt_of(21),
    "at the end": prompt_of(18, None),
    "in the middle": prompt_of(9, None, 7),
    "twice": prompt_of(5, None, 6, None, 4),
    "overlapping": [*prompt_of(9, None), *INVOCATION[1:], *prompt_of(4)],
    "at the beginning": prompt_of(None, 8),
    "alone": list(INVOCATION),
    "half of it": [*prompt_of(9), *INVOCATION[:2]],
    "one token": [13],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_are_those_of_peft(name, world):
    prompt = PROMPTS[name]
    made = ps.rollout(world.shared, TASK, prompt, max_new_tokens=COUNT, stop_ids=())
    assert made.smallest_gap > CLOSE
    assert made.ids == peft_greedy(world.peft, prompt, COUNT)
    base = hf_greedy(world.plain, prompt, COUNT)
    acts = world.shared.split(TASK, prompt).active
    assert acts == (name not in ("none", "half of it", "one token"))
    # What the adapter does is not too little to be noticed.
    assert (made.ids != base) == acts


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_are_those_of_peft(name, world):
    """At every place: the base's before the invocation, the adapter's from it on."""
    prompt = PROMPTS[name]
    split = world.shared.split(TASK, prompt)
    head, tail = prompt[: split.base_len], prompt[split.base_len :]
    after, _ = world.shared.decode(TASK, [tail], world.shared.prefill([head]), active=split.active)
    parts = [*([world.model.logits([head])] if head else []), after]
    assert_close(
        np.concatenate([np.asarray(part) for part in parts], axis=1), hf_logits(world.peft, np.array([prompt]))
    )


def peft_scores(world: World, ids: list[int], prompt: list[int]) -> list[float]:
    """PEFT's log-probability of each id but the first, where the invocation is looked for in `prompt` alone."""
    with torch.no_grad():
        offsets = [None]
        if world.shared.split(TASK, prompt).active:
            offsets = [len(ids) - world.shared.split(TASK, prompt).base_len]
        logits = world.peft(torch.tensor([ids]), use_cache=False, alora_offsets=offsets).logits[0]
    return torch.log_softmax(logits.double(), -1)[torch.arange(len(ids) - 1), ids[1:]].tolist()


@pytest.mark.parametrize("name", sorted(PROMPTS.keys() - {"one token", "half of it"}))
def test_scores_are_those_of_peft(name, world):
    ids = PROMPTS[name]
    scores = ps.score(world.shared, TASK, ids)
    assert scores[0] is None
    assert_close(scores[1:], peft_scores(world, ids, ids))


@pytest.mark.parametrize("name", ["none", "in the middle"])
def test_a_begun_answer_goes_on_as_it_would_have(name, world):
    """Also where the answer itself holds the invocation: what a module says does not move its boundary."""
    prompt = PROMPTS[name]
    whole = ps.rollout(world.shared, TASK, prompt, max_new_tokens=COUNT, stop_ids=()).ids
    begun = ps.generate(
        world.shared, TASK, [*prompt, *whole[:3]], max_new_tokens=COUNT - 3, stop_ids=(), response_start=len(prompt)
    )
    assert begun == whole[3:]
    ids = [*prompt, 5, *INVOCATION, 9]
    scores = ps.score(world.shared, TASK, ids, response_start=len(prompt))
    assert scores[: len(prompt)] == [None] * len(prompt)
    assert_close(scores[len(prompt) :], peft_scores(world, ids, prompt)[len(prompt) - 1 :])


def test_saved_with_a_manifest_it_stays_activated(world, tmp_path):
    module = ps.load_module(world.adapter, world.model)
    assert module.boundary == Boundary(INVOCATION)
    ps.save_module(tmp_path, module, world.model)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["alora_invocation_tokens"] == list(INVOCATION)
    again = ps.load_module(tmp_path, world.model)
    assert again.boundary == module.boundary
    assert again.base is not None
    assert again.base.params is world.model.params
    prompt = np.array([PROMPTS["twice"]])
    assert_close(hf_logits(load_peft(world.base, tmp_path), prompt), hf_logits(world.peft, prompt))


def test_an_adapter_without_the_tokens_is_no_activated_one(world, tmp_path):
    random_adapter(world.base, tmp_path)
    for value in (None, []):
        edit_json(tmp_path / CONFIG_FILE, alora_invocation_tokens=value)
        with pytest.raises(PshareError, match="ordinary fine-tune"):
            ps.load_module(tmp_path, world.model)


def test_a_sharing_ratio_is_refused(world):
    items = [Item("a", tuple(PROMPTS["none"]), "", {})]
    module = ps.load_module(world.adapter, world.model)
    with pytest.raises(PshareError, match=f"{TASK} is an activated LoRA, which has its own boundary"):
        evaluate(world.model, {TASK: module}, items, lambda text, record: 0.0, sharing_ratio=0.5, max_new_tokens=3)
