"""Evaluation generates the plain loop's tokens, with and without sliding windows, for every share of the prompt.

Where the module reads all of the prompt itself, the reference is transformers with the saved module. Prompts are redrawn
until every choice is clear.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from reference import hf_greedy, load_hf, load_peft
from tiny import random_tokens, tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.engine.engine import Engine
from pshare_jax.evaluation.evaluate import evaluate
from pshare_jax.evaluation.tasks import Item
from pshare_jax.share.boundary import base_len, response_start_at

NEW = 6
LENGTHS = (1, 2, 26, 17, 16, 25, 9)
"""More prompts than rows, not in order: page borders, both kinds of nothing to read, rows that take another's place."""
SMALL = {
    "llama": {"num_hidden_layers": 2},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


@dataclass
class Made:
    """A tiny base with a full and a LoRA task."""

    folder: Path
    folders: dict[str, Path]
    shared: ps.SharedModel

    @property
    def base(self) -> ps.Model:
        return self.shared.model

    def module(self, task: str) -> ps.DecodeModule:
        return self.shared.task_modules.module(task)


@pytest.fixture(scope="module", params=("llama", "gemma3"))
def made(request, tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    folder = tiny_folder(request.param, root / "base", **SMALL[request.param])
    folders = {kind: tiny_module(folder, root / kind, kind=kind) for kind in ("full", "lora")}
    shared = ps.factorize(ps.load(folder))
    shared.add_task("base", "base")
    for name, path in folders.items():
        shared.add_task(name, path)
    return Made(folder, folders, shared)


def clear_prompts(shared: ps.SharedModel, task: str, ratio: float) -> tuple[list[list[int]], list[list[int]]]:
    """A prompt of every length, without near-ties, and the plain loop's answers."""
    made = [clear_prompt(shared, task, ratio, length) for length in LENGTHS]
    return [prompt for prompt, _ in made], [ids for _, ids in made]


def clear_prompt(shared: ps.SharedModel, task: str, ratio: float, length: int) -> tuple[list[int], list[int]]:
    # For the plain loop, the part of the prompt that the module reads is a begun answer.
    border = round(ratio * 100) * (length - 1) // 100
    start = border + 1 if border < length - 1 else None
    for seed in range(length, length + 1000):
        prompt = random_tokens(seed, length).tolist()
        rollout = ps.rollout(shared, task, prompt, max_new_tokens=NEW, stop_ids=(), response_start=start)
        if rollout.smallest_gap > 1e-4:
            return prompt, rollout.ids
    raise AssertionError("no prompt is clear")


def generated(made: Made, tasks: tuple[str, ...], prompts: list[list[int]], ratio: float) -> dict[str, list[list[int]]]:
    """The ids that each task answers, as a verifier sees them (a tiny tokenizer's text is no unique name for ids)."""
    ids: dict[str, list[list[int]]] = {task: [] for task in tasks}
    base = replace(made.base, stop_ids=frozenset())
    run = Engine.run

    def noted(self, requests, progress=None):
        results = run(self, requests, progress)
        for result in results:
            ids[result.request.task].append(result.ids)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "run", noted)
        items = [Item(str(index), tuple(prompt), "", {}) for index, prompt in enumerate(prompts)]
        modules = {task: made.module(task) for task in tasks}
        results = evaluate(
            base, modules, items, lambda text, record: 1.0, max_new_tokens=NEW, sharing_ratio=ratio, rows=2
        )
    assert {name: result.num_tokens for name, result in results.items()} == dict.fromkeys(tasks, NEW * len(prompts))
    return ids


def test_equals_the_plain_loop_and_modules_share_prefill(made):
    full, answers = clear_prompts(made.shared, "full", 1.0)
    lora, others = clear_prompts(made.shared, "lora", 1.0)
    ids = generated(made, ("full", "lora"), full + lora, 1.0)
    assert ids["full"][: len(full)] == answers
    assert ids["lora"][len(full) :] == others


def test_the_module_reads_the_rest_of_the_prompt(made):
    ratio = 0.29
    prompts, answers = clear_prompts(made.shared, "full", ratio)
    got = generated(made, ("full",), prompts, ratio)["full"]
    assert got == answers
    shared = generated(made, ("full",), prompts, 1.0)["full"]
    assert sum(a != b for a, b in zip(got, shared, strict=True)) > len(prompts) // 2, "the ratio has no effect here"


def test_ratio_0_is_the_module_by_itself(made):
    """As transformers or PEFT run the saved files, each token from a full forward pass."""
    task = "lora" if made.base.config.family == "llama" else "full"
    hf = load_hf(made.folders["full"]) if task == "full" else load_peft(made.folder, made.folders["lora"])
    prompts, _ = clear_prompts(made.shared, task, 0.0)
    assert generated(made, (task,), prompts, 0.0)[task] == [hf_greedy(hf, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize(("length", "ratio", "start"), [(101, 0.29, 30), (101, 1.0, None), (1, 0.5, None), (2, 0.0, 1)])
def test_the_base_encodes_the_rounded_down_share(length, ratio, start):
    assert response_start_at(length, ratio) == start
    assert start is None or base_len(length, start) == int(ratio * base_len(length) + 1e-9)
