"""Activated LoRA through the real engine: ids, scores and cached tokens are those of `generate`, which PEFT confirms
(tests/share/test_activated_lora.py), split and colocated, beside other tasks on the same prefix.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from peft_adapters import peft_greedy, random_adapter
from reference import load_peft
from tiny import tiny_folder
from tiny_engine import COLOCATED, MIN_GAP, SPLIT, Engines, prefill_tokens

import pshare_jax as ps
from pshare_jax.engine.request import Request
from pshare_jax.server.tasks.loader import TaskLoader

INVOCATION = (7, 300, 7)
PAGE = 4
HEAD = 22
"""Tokens before the last invocation of most prompts: five full pages."""
COUNT = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("activated")
    base = tiny_folder("llama", root / "base")
    random_adapter(base, root / "adapter", alora_invocation_tokens=list(INVOCATION))
    random_adapter(base, root / "other", alora_invocation_tokens=list(INVOCATION), seed=1, rank_pattern={"q_proj": 2})
    return base, root


@pytest.fixture(
    scope="module", params=[SPLIT, pytest.param(COLOCATED, marks=pytest.mark.slow)], ids=["split", "colocated"]
)
def engines(request, folders) -> Engines:
    """With pages that are filled with NaN when they are freed."""
    base, root = folders
    tasks = {"checker": root / "adapter", "chat": "base"}
    return Engines(base, tasks, request.param, page_size=PAGE, pages=96, rows=2, debug=True)


def prompts(seed: int) -> dict[str, list[int]]:
    """Prompts with none, one and two invocations, all with one beginning."""
    draw = np.random.default_rng(seed)
    head, middle, tail = (draw.integers(8, 300, num).tolist() for num in (9, HEAD - 9 - len(INVOCATION), 5))
    once = [*head, *INVOCATION, *middle]
    return {
        "none": [*head, 8, 9, 10, *middle, *tail],
        "once": [*once, *tail],
        "twice": [*once, *INVOCATION, *tail],
        "at the end": [*once, *INVOCATION],
        "at the beginning": [*INVOCATION, *tail],
    }


def requests(engines: Engines, **fields: Any) -> dict[str, Request]:
    """The first prompts that no other request of the engine had, without a near-tie."""
    for seed in range(100):
        made = {name: engines.request("checker", ids, COUNT, **fields) for name, ids in prompts(seed).items()}
        if all(engines.expected(request).smallest_gap >= MIN_GAP for request in made.values()):
            return made
    raise AssertionError("every prompt has a near-tie")


def test_ids_with_cold_and_warm_cache(engines, folders):
    base, root = folders
    made = requests(engines)
    theirs = load_peft(base, root / "adapter")
    others = [engines.request("chat", request.prompt, COUNT) for request in made.values()]
    others = [request for request in others if engines.expected(request).smallest_gap >= MIN_GAP]
    answers = engines.check(*made.values(), *others)
    for request, answer in zip(made.values(), answers, strict=False):
        assert answer.ids == peft_greedy(theirs, request.prompt, COUNT)
    assert prefill_tokens(engines.engine) == sum(
        answer.sequence.split.base_len - answer.cached_tokens for answer in [*answers]
    )
    again = engines.check(*[engines.again(request) for request in made.values()])
    num_base = {
        "none": len(made["none"].prompt) - 1,
        "once": 9,
        "twice": HEAD,
        "at the end": HEAD,
        "at the beginning": 0,
    }
    cached = [answer.cached_tokens for answer in again]
    assert cached == [num // PAGE * PAGE for num in num_base.values()]


def test_another_task_brings_the_prefix(engines):
    """And finds it: a page before the invocation has one KV, whoever asks first."""
    engine = engines.new_engine()
    twice = requests(engines)["twice"]
    [first] = engines.check(engines.request("chat", twice.prompt[: HEAD + 1], 1), engine=engine)
    [second] = engines.check(twice, engine=engine)
    assert (first.cached_tokens, second.cached_tokens) == (0, HEAD // PAGE * PAGE)
    third = engines.request("chat", [*twice.prompt, 9], 1)
    assert engines.expected(third).smallest_gap >= MIN_GAP
    [answer] = engines.check(third, engine=engine)
    assert answer.cached_tokens == HEAD // PAGE * PAGE


@pytest.mark.parametrize("begun", [False, True])
def test_scores_of_prompts(engines, begun):
    for name, request in requests(engines).items():
        start = len(request.prompt) - 2 if begun else None
        asked = engines.request("checker", request.prompt, 0, logprobs=0, scores_prompt=True, response_start=start)
        [answer] = engines.run(asked)
        scores = [one and one.logprob for one in answer.events[0].prompt_logprobs]
        expected = ps.score(engines.oracle("checker"), "checker", request.prompt, response_start=start)
        assert [one is None for one in scores] == [one is None for one in expected], name
        pairs = [(ours, right) for ours, right in zip(scores, expected, strict=True) if right is not None]
        assert np.abs(np.subtract(*np.array(pairs).T)).max() < 1e-4, name


def test_loaded_at_run_time(engines, folders):
    """As the tasks API does; the new task has other weights under the same architecture, and the old one stays."""
    root, engine = folders[1], engines.engine
    loaded, _ = TaskLoader(engine).load(root / "other", [0], lambda: None)
    engine.put_task("new", loaded)
    oracle = ps.factorize(engines.model)
    oracle.add_task("new", root / "other")
    for request in requests(engines).values():
        expected = ps.rollout(oracle, "new", request.prompt, max_new_tokens=COUNT, stop_ids=request.stop_ids)
        if expected.smallest_gap < MIN_GAP:
            continue
        [new] = engines.run(engines.request("new", request.prompt, COUNT))
        assert new.ids == expected.ids
    engine.put_task("new", {})


def test_a_module_in_memory_moves_with_its_base(folders):
    """To the devices of a decode worker, where all tasks have one copy of the base."""
    base, root = folders
    model = ps.load(base)
    tasks = {"chat": "base", "memory": ps.load_module(root / "adapter", model), "folder": str(root / "adapter")}
    config = ps.EngineConfig(tasks=tasks, placement=SPLIT)
    [spec] = ps.Engine.build(model, config).decode_specs
    chat, devices = spec.tasks["chat"], {jax.devices()[1]}
    for name in ("memory", "folder"):
        module = spec.tasks[name]
        assert module.boundary.invocation == INVOCATION
        assert module.base is not None
        assert module.base.params is chat.params
        assert all(array.devices() == devices for array in module.params.values())


@pytest.mark.slow
def test_isolated(folders):
    """Its own prefill worker has the base's weights."""
    base, root = folders
    engines = Engines(base, {"checker": root / "adapter"}, COLOCATED, sharing="isolated", page_size=PAGE, rows=2)
    engines._oracles["checker"] = shared = ps.factorize(engines.model)
    shared.add_task("checker", root / "adapter")
    engines.check(*requests(engines).values())
