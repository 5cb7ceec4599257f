"""Four adapters of different rank, targets and scale, the base and full weights at once: each answer is the plain loop's, and
rows of all adapters and of the base share their steps.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from exact_world import LOGPROB_TOLERANCE
from tiny import random_adapter_module, tiny_folder, tiny_module
from tiny_engine import SPLIT, Answer, Engines, settle

import pshare_jax as ps
from pshare_jax.engine.config import EngineConfig, KVConfig, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.scoring import SHORT, size_of
from pshare_jax.engine.warmup import variants
from pshare_jax.model.layers import LoraConfig
from pshare_jax.model.paged_batch import DecodeBatch

EVERY = ("q", "k", "v", "o", "gate", "up", "down")
LORAS = {
    "one": LoraConfig(1, 4.0, ("q", "v")),
    "three": LoraConfig(3, 1.5, ("k", "o", "down")),
    "eight": LoraConfig(8, 0.5, EVERY),
    "five": LoraConfig(5, 1.0, ("gate", "up")),
}
STACKED = ("base", *LORAS)
SCORED = ("base", "three", "five")
LENGTH, ANSWER = 9, 6


class Steps:
    """The slots of the real rows of every step of the engine, by the step's shape."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[tuple[int, ...], list[int]]] = []
        for pool in engine.pools:
            monkeypatch.setattr(pool, "run", self._watching(pool.run))

    def _watching(self, run):
        def watched(step, params, tokens, metadata):
            if isinstance(tokens, DecodeBatch):
                batch, shape, real = tokens, (len(tokens.slots), 1), tokens.slots < len(tokens.tokens) - 1
            else:
                batch = getattr(metadata, "batch", metadata)
                shape, real = tokens.shape, batch.query_lens > 0
            self.seen.append((shape, batch.adapters[real].tolist()))
            return run(step, params, tokens, metadata)

        return watched

    def of(self, *shape: int) -> list[list[int]]:
        """Those of one shape."""
        return [slots for seen, slots in self.seen if seen == shape]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A base's folder, and the sources of its tasks."""
    root = tmp_path_factory.mktemp("adapters")
    folder = tiny_folder("llama", root / "base", num_hidden_layers=2)
    base, sources = ps.load(folder), {"base": "base", "full": str(tiny_module(folder, root / "full"))}
    for seed, (name, lora) in enumerate(LORAS.items()):
        ps.save_module(root / name, random_adapter_module(base, lora, seed), base)
        sources[name] = str(root / name)
    return folder, sources


def mixed(engines: Engines, names, seed: int, **fields):
    """A request for each task, of a prompt of their own."""
    draw = np.random.default_rng(seed)
    return [engines.clear(draw, name, LENGTH, ANSWER, **fields) for name in names]


@pytest.mark.parametrize(
    ("placement", "sharing"),
    [(SPLIT, "shared"), (SPLIT, "isolated"), (placed([[0]], [[2, 3]]), "shared")],
    ids=["split", "isolated", "tp2"],
)
def test_all_kinds_of_tasks_in_one_mix_answer_as_the_plain_loop(tasks, placement, sharing, monkeypatch):
    folder, sources = tasks
    engines = Engines(folder, sources, placement, sharing=sharing, rows=6, pages=240)
    steps = Steps(engines.engine, monkeypatch)
    answers = mixed(engines, sources, 1)
    scored = mixed(engines, SCORED, 2, logprobs=2, scores_prompt=True)
    got = engines.check(*answers, *scored)
    for request, answer in zip(scored, got[len(answers) :], strict=True):
        found = [score.logprob for score in answer.events[0].prompt_logprobs[1:] if score is not None]
        wanted = ps.score(engines.oracle(request.task), request.task, request.prompt)[1:]
        np.testing.assert_allclose(found, np.array(wanted, np.float32), atol=LOGPROB_TOLERANCE)
    # The same again from a warm cache, so that all start at once: a step a token for the five, and one for the full task.
    worker, scoring = engines.engine.decode_workers[0], len(steps.of(*size_of(SHORT)))
    before, seen = (worker.num_steps, worker.num_tokens), len(steps.seen)
    engines.check(*(engines.again(request) for request in answers))
    assert worker.num_tokens - before[1] == ANSWER * len(sources)
    assert worker.num_steps - before[0] <= 2 * ANSWER + 2
    assert any(sorted(slots) == [0, 1, 2, 3, 4] for _, slots in steps.seen[seen:])
    engines.run(*(engines.again(request) for request in scored))
    assert any(len(set(slots)) == len(SCORED) for slots in steps.of(*size_of(SHORT))[scoring:])


def lora_tasks(base: ps.Model, count: int) -> dict[str, ps.DecodeModule | str]:
    """The base and so many adapters of different rank, targets and scale."""
    shapes = itertools.cycle(LORAS.values())
    return {"chat": "base", **{f"lora{i}": random_adapter_module(base, next(shapes), i) for i in range(count)}}


@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_the_number_of_programs_does_not_depend_on_the_number_of_adapters(tasks, sharing):
    base, found = ps.load(tasks[0]), []
    for count in (0, 1, 2, 8):
        # In the isolated baseline each task has a pool of its own: of the same size, whatever their number.
        pages = 64 * (count + 1) if sharing == "isolated" else 64
        config = EngineConfig(
            tasks=lora_tasks(base, count), placement=placed([[0]], [[1]]), sharing=sharing, kv=KVConfig(4, pages)
        )
        programs = variants(Engine.build(base, config))
        found.append(sorted(variant.name for variant in programs if not variant.name.startswith(("gather", "scatter"))))
    assert found[0] == found[1] == found[2] == found[3]


def test_running_requests_go_on_when_the_stack_grows(tasks):
    """A sequence keeps its slot when an adapter of a larger rank and new targets arrives between two of its tokens."""
    folder, sources = tasks
    engines = Engines(folder, {"base": "base", "one": sources["one"]}, rows=4)
    engine, [running, plain] = engines.engine, mixed(engines, ("one", "base"), 1)
    first = [Answer(engine, running), Answer(engine, plain)]
    while len(first[0].ids) < 2:
        engine.step()
    spec = engine.decode_specs[0]
    grown = spec.stack.place({"new": ps.load_module(sources["eight"], spec.base)}, engine.modules_in_use(0))
    engine.put_task("new", {0: spec.stack.publish(grown)["new"]})
    assert engine.decode_workers[0].tasks["new"].slot == 2
    oracle = Engines(folder, sources)
    [asked] = mixed(oracle, ("eight",), 4)
    last = Answer(engine, dataclasses.replace(asked, id="new", task="new"))
    while not all(answer.ended for answer in (*first, last)):
        engine.step()
    settle(engine)
    assert [answer.ids for answer in (*first, last)] == [oracle.expected(one).ids for one in (running, plain, asked)]
