"""startup.py in this process: placements other than the default, warm-up, and errors before serving."""

import logging
import re
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from peft_adapters import random_adapter
from tiny import tiny_module

import pshare_jax as ps
from pshare_jax.engine.config import BatchConfig, DecodePlacement, KVConfig, LimitsConfig, Placement, PrefillPlacement
from pshare_jax.engine.request import Request
from pshare_jax.engine.warmup import Variant
from pshare_jax.server import startup
from pshare_jax.server.config import ServeConfig, ServerConfig
from pshare_jax.settings import load_settings

PROMPTS = [(5,), (5, 6, 7), tuple(range(40, 50))]
KV, BATCH = KVConfig(page_size=4, pages=32), BatchConfig(prefill_tokens=16, decode_rows=2)


def placed(prefill, decode):
    return Placement(
        [PrefillPlacement(devices) for devices in prefill], [DecodePlacement(devices) for devices in decode]
    )


def build(config):
    return startup.build(config, lambda line: None)


def answers(engine, task, route=None):
    """The engine's ids for each prompt, one after another."""
    ids = []
    for number, prompt in enumerate(PROMPTS):
        events = []
        request = Request(f"{task}-{number}", task, prompt, 5)
        engine.submit(request, events.append, route)
        sequence = engine._live[request.id]
        while engine.num_live:
            engine.step()
        assert events[-1].finish_reason == "length", events
        ids.append(sequence.decode.completion_ids)
    return ids


@pytest.fixture(scope="module")
def world(tiny_folders, tmp_path_factory):
    """A config with a base and its tasks, and the oracle's ids for every task and prompt."""
    base = tiny_folders["llama"]
    tasks = {"chat": "base", "math": str(tiny_module(base, tmp_path_factory.mktemp("module") / "math"))}
    shared = ps.factorize(ps.load(base))
    for name, source in tasks.items():
        shared.add_task(name, source)
    oracle = {
        name: [ps.generate(shared, name, prompt, max_new_tokens=5, stop_ids=()) for prompt in PROMPTS] for name in tasks
    }
    assert oracle["chat"] != oracle["math"]
    return ServeConfig(base=str(base), tasks={**tasks}, kv=KV, batch=BATCH), oracle


@pytest.mark.parametrize(
    ("placement", "num_pools"),
    [(None, 2), (placed([[0]], [[0]]), 1), (placed([[0, 1]], [[2]]), 2), (placed([[0], [1]], [[0], [1]]), 2)],
    ids=["default", "colocated", "tp2-tp1", "two-each"],
)
def test_every_route_equals_the_oracle(world, placement, num_pools):
    config, oracle = world
    engine = build(replace(config, placement=placement))[0].engine
    for route, task in engine.router.all_routes():
        assert answers(engine, task, route) == oracle[task]
    assert len({id(worker.pool) for worker in (*engine.prefill_workers, *engine.decode_workers)}) == num_pools
    engine.admission.check()


def test_isolated_tasks_prefill_with_their_own_weights(world):
    """The oracle is generation with a task's own weights on both sides; the base's task is unchanged."""
    config, oracle = world
    engine = build(replace(config, sharing="isolated"))[0].engine
    assert [(route.prefill, task) for route, task in engine.router.all_routes()] == [(0, "chat"), (1, "math")]
    assert answers(engine, "chat") == oracle["chat"]
    model = ps.load(config.base)
    module = ps.load_module(config.tasks["math"], model)
    own = replace(model, architecture=module.architecture, params=module.params)
    alone = ps.factorize(own)
    alone.add_task("math", "base")
    right = [ps.generate(alone, "math", prompt, max_new_tokens=5, stop_ids=()) for prompt in PROMPTS]
    assert answers(engine, "math") == right
    assert right != oracle["math"]
    # Together they have as many pages as the shared engine's prefill worker, and share none.
    assert sum(worker.pool.num_pages for worker in engine.prefill_workers) == KV.pages
    assert all(worker.pool.cache_stats.cached_tokens == 0 for worker in engine.prefill_workers)


def devices(tree):
    return {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}


def test_by_default_prefill_and_decode_are_on_disjoint_devices(world):
    """Invariant 8: weights, pages and transfers."""
    config, _ = world
    engine = build(config)[0].engine
    prefill, decode = engine.prefill_workers[0], engine.decode_workers[0]
    first, second = jax.devices()[:2]
    stores: list[Any] = [prefill.pool.store, decode.pool.store]
    assert [devices(store.pages) for store in stores] == [{first}, {second}]
    assert devices(prefill._weights.params) == {first}
    assert devices([weights.params for weights in decode._tasks.values()]) == {second}
    engine.submit(Request("r", "chat", tuple(range(30)), 5), lambda event: None)
    prefill.step()
    assert [devices(copy.content) for copy in engine.admission.in_flight[0]] == [{second}]
    while engine.num_live:
        engine.step()
    assert [devices(store.pages) for store in stores] == [{first}, {second}]


def test_config_values_reach_the_engine(world):
    config, _ = world
    config = replace(
        config,
        routing="least_loaded",
        attention="xla",
        debug=True,
        limits=LimitsConfig(7, 9.0),
        server=ServerConfig(max_body_bytes=1000),
    )
    served, _ = build(config)
    engine = served.engine
    assert (engine.facts.max_len, engine.chunk_tokens) == (31 * 4, 16)
    assert replace(engine.config, placement=None) == config
    assert (served.limits.max_len, served.limits.vocab_size, served.max_body_bytes) == (31 * 4, 320, 1000)
    assert served.tasks == ["chat", "math"]
    pools = {worker.pool for worker in (*served.engine.prefill_workers, *served.engine.decode_workers)}
    assert all(pool._debug and (pool.num_pages, pool.page_size) == (32, 4) for pool in pools)


# --- warm-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_warm_up_runs_every_task_and_compiles_the_rest(world, full):
    config, _ = world
    lines = []
    served, programs = build(config)
    assert 0 < sum(program.small for program in programs) < len(programs) <= 40
    compiled = []
    noted = [replace(program, lower=lambda program=program: _noted(program, compiled)) for program in programs]
    served.engine.start()
    compiler = startup.warm_up(served, noted, full, lines.append)
    small = [program for program in programs if program.small]
    assert compiled[: len(small)] == small
    assert re.findall(r"\d+", lines[0]) == [str(len(programs if full else small)), str(len(programs))]
    compiler._thread.join()
    compiler.stop()
    assert served.engine.warm or not full
    assert sorted(program.name for program in compiled) == sorted(program.name for program in programs)
    assert len(lines) == 2
    served.engine.stop()
    assert sum(worker.num_tokens for worker in served.engine.decode_workers) == 2 * len(config.tasks)
    # No page of the warm-up remains in the prefix cache for user prompts.
    assert all(worker.pool.cache_stats.cached_tokens == 0 for worker in served.engine.prefill_workers)


def test_warm_up_of_an_activated_lora(tiny_folders, tmp_path):
    """Its own weights give the first answer, which needs a scoring step: the server must not wait for that program."""
    base = tiny_folders["llama"]
    random_adapter(base, tmp_path, alora_invocation_tokens=[7, 8])
    config = ServeConfig(
        base=str(base), tasks={"checker": str(tmp_path)}, placement=placed([[0]], [[0]]), kv=KV, batch=BATCH
    )
    served, programs = build(config)
    assert [program.name for program in programs if program.small and "score" in program.name] == ["score 1x64"]
    # Others wait until the server has started.
    rest = [
        replace(program, lower=lambda: SimpleNamespace(compile=lambda: None))
        for program in programs
        if not program.small
    ]
    served.engine.start()
    compiler = startup.warm_up(served, [*(p for p in programs if p.small), *rest], False, lambda line: None)
    compiler.stop()
    served.engine.stop()
    [worker] = served.engine.decode_workers
    assert (worker.num_tokens, worker.num_scored) == (2, 1)
    assert served.engine.prefill_workers[0].stats.tokens == 40


def _noted(program: Variant, compiled: list[Variant]) -> Any:
    compiled.append(program)
    return program.lower()


def test_shutdown_waits_for_at_most_one_compilation(world):
    config, _ = world
    served, programs = build(config)
    begun, go, compiled = threading.Event(), threading.Event(), []

    def slow(program):
        begun.set()
        assert go.wait(20)
        return _noted(program, compiled)

    noted = [
        program if program.small else replace(program, lower=lambda program=program: slow(program))
        for program in programs
    ]
    served.engine.start()
    compiler = startup.warm_up(served, noted, False, lambda line: None)
    assert begun.wait(20)
    threading.Timer(0.1, go.set).start()
    compiler.stop()
    served.engine.stop()
    assert len(compiled) == 1


def test_a_failed_warm_up_request_ends_the_start(world, monkeypatch, caplog):
    config, _ = world
    served, _ = build(config)
    monkeypatch.setattr(served.engine.decode_workers[0], "_run", lambda batch: 1 / 0)
    served.engine.start()
    with (
        caplog.at_level(logging.CRITICAL),
        pytest.raises(ps.PshareError, match="'chat'"),
    ):
        startup.first_answers(served)
    served.engine.stop()


def test_the_smallest_pools(world):
    """Two pages of one token: a prompt and a completion of one token each."""
    config, _ = world
    served, _ = build(replace(config, kv=KVConfig(page_size=1, pages=3)))
    assert served.limits.max_len == 2
    served.engine.start()
    startup.first_answers(served)
    served.engine.stop()


def test_configs_that_cannot_be_served_are_one_sentence_errors(world, tmp_path):
    config, _ = world
    for changes in (
        {"base": str(tmp_path / "none")},
        {"base": str(tmp_path)},
        {"tasks": {"chat": str(tmp_path / "none")}},
        {"tasks": {"chat": config.base}},
        {"placement": placed([[0, 1, 2]], [[3]])},
        {"placement": placed([[0]], [[99]])},
        {"sharing": "isolated", "kv": KVConfig(page_size=4, pages=5)},
    ):
        with pytest.raises(ps.PshareError, match=r"^[^\n]*$"):
            build(replace(config, **changes))


def test_the_api_key_is_read_from_config_or_environment(world, monkeypatch):
    config, _ = world
    keyed = replace(config, server=replace(config.server, api_key="of the config"))
    monkeypatch.delenv("PSHARE_API_KEY", raising=False)
    assert [build(each)[0].api_key for each in (config, keyed)] == [None, "of the config"]
    monkeypatch.setenv("PSHARE_API_KEY", "abc\n")
    assert build(config)[0].api_key == "abc"
    monkeypatch.setenv("PSHARE_API_KEY", " ")
    with pytest.raises(ps.PshareError, match="PSHARE_API_KEY"):
        build(config)


@pytest.mark.parametrize(
    ("key", "overrides", "facts"),
    [
        (None, ["server.modules_dir=."], "server.modules_dir server.api_key PSHARE_API_KEY"),
        (" ", [], "PSHARE_API_KEY empty"),
        (" ", ["server.modules_dir=."], "PSHARE_API_KEY empty"),
        ("key", ["server.modules_dir=nowhere"], "server.modules_dir 'nowhere' folder"),
        ("key", ["server.modules_dir=''"], "server.modules_dir '' folder"),
        ("key", ["server.modules_dir=serve.yaml"], "server.modules_dir 'serve.yaml' folder"),
    ],
)
def test_modules_dir_and_key_are_checked_before_loading(tmp_path, monkeypatch, key, overrides, facts):
    """The config's base does not exist, which would be the next error."""
    (tmp_path / "serve.yaml").write_text("base: nothing\ntasks: {chat: base}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSHARE_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("PSHARE_API_KEY", key)
    lines = []
    with pytest.raises(ps.PshareError) as caught:
        startup.build(load_settings(ServeConfig, tmp_path / "serve.yaml", overrides), lines.append)
    assert all(fact in str(caught.value) for fact in facts.split())
    assert lines == []
