"""Batched generation equals the plain loop token by token, in every family, for every share of the prompt.

Where the module reads all of the prompt itself, the reference is transformers with the saved module. Prompts are redrawn
until every choice is clear.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from reference import hf_greedy, load_hf, load_peft
from tiny import FAMILIES, random_tokens, tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.evaluation import generation
from pshare_jax.evaluation.generation import generate_batch, generate_each, num_shared

NEW = 6
LENGTHS = (1, 2, 26, 17, 16, 25, 9)
"""More prompts than rows, not in order: page borders, both kinds of nothing to read, rows that take another's place."""
SMALL = {
    "llama": {"num_hidden_layers": 2},
    "qwen3": {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
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


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp(request.param)
    folder = tiny_folder(request.param, root / "base", **SMALL[request.param])
    folders = {kind: tiny_module(folder, root / kind, kind=kind) for kind in ("full", "lora")}
    shared = ps.factorize(ps.load(folder))
    shared.add_task("base", "base")
    for name, path in folders.items():
        shared.add_task(name, path)
    return Made(folder, folders, shared)


@pytest.fixture
def small_calls(monkeypatch):
    """Prefills in chunks and several calls, as with long prompts and many rows."""
    monkeypatch.setattr(generation, "CHUNK", 16)
    monkeypatch.setattr(generation, "CALL_TOKENS", 48)


def clear_prompts(shared: ps.SharedModel, task: str, ratio: float) -> tuple[list[list[int]], list[list[int]]]:
    """A prompt of every length of which every choice is clear, and the plain loop's answers."""
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


@pytest.mark.parametrize("task", ["full", "lora"])
def test_equals_the_plain_loop(made, task, small_calls):
    prompts, answers = clear_prompts(made.shared, task, 1.0)
    assert generate_batch(made.base, made.module(task), prompts, max_new_tokens=NEW, stop_ids=(), rows=2) == answers


def test_the_module_reads_the_rest_of_the_prompt(made, small_calls):
    task, ratio = "full", 0.29
    prompts, answers = clear_prompts(made.shared, task, ratio)
    module = made.module(task)
    got = generate_batch(made.base, module, prompts, max_new_tokens=NEW, stop_ids=(), sharing_ratio=ratio, rows=2)
    assert got == answers
    shared = generate_batch(made.base, module, prompts, max_new_tokens=NEW, stop_ids=(), rows=2)
    assert got[0] == shared[0]
    assert sum(a != b for a, b in zip(got, shared, strict=True)) > len(prompts) // 2, "the ratio has no effect here"


def test_ratio_0_is_the_module_by_itself(made, small_calls):
    """As transformers or PEFT run the saved files, each token from a full forward pass."""
    task = "lora" if made.base.config.family == "llama" else "full"
    hf = load_hf(made.folders["full"]) if task == "full" else load_peft(made.folder, made.folders["lora"])
    prompts, _ = clear_prompts(made.shared, task, 0.0)
    got = generate_batch(
        made.base, made.module(task), prompts, max_new_tokens=NEW, stop_ids=(), sharing_ratio=0.0, rows=4
    )
    assert got == [hf_greedy(hf, prompt, NEW) for prompt in prompts]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Made:
    folder = tiny_folder("llama", tmp_path_factory.mktemp("one") / "base", **SMALL["llama"])
    shared = ps.factorize(ps.load(folder))
    shared.add_task("base", "base")
    return Made(folder, {}, shared)


def test_answers_end_at_stop_ids_and_come_as_they_end(llama):
    prompts, answers = clear_prompts(llama.shared, "base", 1.0)
    stops = {answers[2][1], answers[5][3], answers[6][0]}
    want = [ids[: next((i + 1 for i, token in enumerate(ids) if token in stops), NEW)] for ids in answers]
    assert len({len(ids) for ids in want}) > 2
    module = llama.module("base")
    assert generate_batch(llama.base, module, prompts, max_new_tokens=NEW, stop_ids=stops, rows=2) == want
    order = [i for i, _ in generate_each(llama.base, module, prompts, max_new_tokens=NEW, stop_ids=stops, rows=2)]
    assert sorted(order) == list(range(len(prompts)))
    together = generate_each(llama.base, module, prompts, max_new_tokens=NEW, stop_ids=stops, rows=64)
    assert [len(ids) for _, ids in together] == sorted(map(len, want))


def test_the_base_s_end_set_is_the_default(llama):
    prompts, answers = clear_prompts(llama.shared, "base", 1.0)
    model = llama.base
    stop = answers[2][1]
    got = generate_batch(replace(model, stop_ids=frozenset({stop})), llama.module("base"), prompts, max_new_tokens=NEW)
    assert got[2] == answers[2][:2]


def test_rows_that_ended_cost_nothing(llama, monkeypatch):
    """Steps get smaller as rows end, and others take the places of those that did."""
    prompts, answers = clear_prompts(llama.shared, "base", 1.0)
    stops = {ids[0] for ids in answers[:5]}
    sizes: list[int] = []
    real = generation._Batch.next_tokens

    def counted(batch, rows):
        sizes.append(len(rows))
        return real(batch, rows)

    monkeypatch.setattr(generation._Batch, "next_tokens", counted)
    got = generate_batch(llama.base, llama.module("base"), prompts, max_new_tokens=NEW, stop_ids=stops, rows=2)
    assert sum(sizes) == sum(map(len, got))
    assert len(sizes) <= sum(sizes) / 2 + NEW


def num_programs(module: ps.DecodeModule) -> int:
    steps: Any = module.paged
    return steps.decode._cache_size() + steps.prefill._cache_size()


def test_few_programs(llama):
    """Another set of prompts of like sizes compiles nothing."""
    module = llama.module("base")

    def run(seed: int) -> None:
        prompts = [random_tokens(seed + n, n).tolist() for n in range(20 + seed, 60 + seed, 3)]
        generate_batch(llama.base, module, prompts, max_new_tokens=NEW, stop_ids=(), rows=2)

    run(0)
    before = num_programs(module)
    run(1)
    assert num_programs(module) == before


@pytest.mark.parametrize(("length", "ratio", "shared"), [(1, 1.0, 0), (101, 0.29, 29), (11, 0.7, 7), (8, 0.5, 3)])
def test_num_shared(length, ratio, shared):
    assert num_shared(length, ratio) == shared


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1], [320]]}, "token ids must be 0 to 319"),
        ({"prompts": [[1] * 510]}, "maximum context length is 512 tokens, but prompt 0 has 510 and 6 more"),
        ({"max_new_tokens": -1}, "max_new_tokens must not be negative"),
        ({"sharing_ratio": 1.5}, "sharing_ratio must be from 0 to 1, but is 1.5"),
        ({"sharing_ratio": float("nan")}, "sharing_ratio must be from 0 to 1"),
        ({"rows": 0}, "rows must be at least 1"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(llama, changes, sentence):
    arguments = {"prompts": [[1]], "max_new_tokens": NEW, **changes}
    with pytest.raises(PshareError, match=sentence):
        generate_each(llama.base, llama.module("base"), **arguments)


def test_nothing_to_do(llama):
    assert generate_batch(llama.base, llama.module("base"), [], max_new_tokens=NEW) == []
    assert generate_batch(llama.base, llama.module("base"), [[1], [2]], max_new_tokens=0) == [[], []]
