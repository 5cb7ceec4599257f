"""`Engine.build` and `generate` on a real model, as README's offline block uses them."""

import jax
import pytest
from tiny import tiny_module

import pshare_jax as ps
from pshare_jax.engine.config import placed

PROMPTS = [list(range(start, start + 21)) for start in (3, 50, 140)]


@pytest.mark.parametrize("decode", [[0], [1], [2, 3]])
def test_tasks_in_memory_and_in_folders_answer_as_the_plain_loop_on_any_devices(tiny_folders, tmp_path, decode):
    base = ps.load(tiny_folders["llama"])
    folder = tiny_module(tiny_folders["llama"], tmp_path / "lora", kind="lora")
    tasks = {"chat": "base", "folder": str(folder), "memory": ps.load_module(folder, base)}
    shared = ps.factorize(base)
    shared.add_task("memory", tasks["memory"])
    engine = ps.Engine.build(base, ps.EngineConfig(tasks=tasks, placement=placed([[0]], [decode])))
    wanted = [ps.rollout(shared, "memory", prompt, max_new_tokens=6) for prompt in PROMPTS]
    assert min(rollout.smallest_gap for rollout in wanted) > 1e-4
    for task in ("folder", "memory"):
        results = engine.generate(PROMPTS, task, max_tokens=6)
        assert [result.ids for result in results] == [rollout.ids for rollout in wanted]
    weights = engine.decode_workers[0].tasks
    assert all(set(x.devices()) == {jax.devices()[i] for i in decode} for x in weights["memory"].params.values())
    assert weights["memory"].params is weights["chat"].params
    assert engine.idle
