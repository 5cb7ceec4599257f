"""Real weights loaded, replaced and unloaded: each request's completion equals the oracle's on the weights at its arrival,
unused weights are freed, and workers never compile.
"""

import functools
import gc
import json
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fake_server import answering
from peft_adapters import random_adapter
from safetensors.numpy import load_file, save_file
from task_world import LONG, PLACE, World
from tiny import edit_json

from pshare_jax.engine.config import BatchConfig, DecodePlacement
from pshare_jax.engine.sequence import State
from pshare_jax.engine.warmup import BackgroundCompiler, Variant, compile_all, decode_variants
from pshare_jax.model.architecture import is_stacked
from pshare_jax.server.compile_counter import count_compilations
from pshare_jax.server.config import ServerConfig
from pshare_jax.server.openai.schema import ApiError
from pshare_jax.share.decode_module import MANIFEST
from pshare_jax.share.lora import CONFIG_FILE, WEIGHTS_FILE
from pshare_jax.weights.safetensors import SINGLE_FILE


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world):
    """A server with a base task and a full task; every test restores its tasks."""
    stepped = world.serve({"chat": "base", "math": "full"})
    yield stepped
    stepped.table.stop()


# --- answers ---------------------------------------------------------------------------------------------------------


def test_tasks_of_every_kind_are_loaded_replaced_and_unloaded_on_every_worker(world):
    """One decode worker has all tasks, another only its own: a task is replaced where it is, a new task goes to the first."""
    workers = [DecodePlacement([3], tasks=["chat"]), DecodePlacement([4, 5])]
    batch = BatchConfig(prefill_tokens=16, decode_rows=1)
    stepped = world.serve({"chat": "base", "math": "full"}, replace(PLACE, decode=workers), batch=batch)
    for name, module in (("a", "lora"), ("b", "full")):
        stepped.load(name, module)
    stepped.check_everywhere(chat="base", math="full", a="lora", b="full")
    for name, module in (("a", "full2"), ("chat", "lora2"), ("math", "full2")):
        stepped.load(name, module, True)
    stepped.check_everywhere(chat="lora2", math="full2", a="full2", b="full")
    served = [list(worker.tasks) for worker in stepped.engine.decode_workers]
    assert served == [["chat"], ["chat", "math", "a", "b"]]
    for name in ("math", "b", "chat", "a"):
        stepped.table.unload(name).result(10)
    assert stepped.served.tasks == []
    assert not any(worker.tasks for worker in stepped.engine.decode_workers)
    stepped.table.stop()


def test_an_activated_lora_of_peft_is_loaded_unmodified(world, server):
    """Its invocation is in the prompt, so its boundary is there, and what the base encoded before is shared."""
    first, invocation = 5, world.prompt[5:7]
    random_adapter(world.base, world.modules / "activated", alora_invocation_tokens=list(invocation))
    world.shared.add_task("activated", world.modules / "activated")
    assert world.rollout("activated", world.prompt).smallest_gap > 1e-4
    server.check(chat="base")
    server.load("x", "activated")
    asked = server.ask("x")
    assert server.ids(asked) == [world.expected("activated")]
    assert world.expected("activated") != world.expected("base")
    assert (asked.split.base_len, asked.cached_tokens) == (first, 4)
    random_adapter(world.base, world.modules / "plain")
    assert "ordinary fine-tune prefills with its own weights" in server.refusal("y", "plain")
    server.table.unload("x").result(10)


def test_running_requests_finish_on_the_old_weights(world, server):
    """The task is replaced twice after a few tokens; one request waits throughout, since a step has two rows."""
    expected = world.expected
    server.load("x", "lora")
    old = [server.ask("x"), server.ask("x"), server.ask("math")]
    server.step_until(lambda: len(old[0].decode.completion_ids) == 5)
    server.load("x", "full2", True)
    between = server.ask("x")
    server.step_until(lambda: len(between.decode.completion_ids) == 3)
    server.load("x", "lora2", True)
    new = server.ask("x")
    assert all(0 < len(sequence.decode.completion_ids) < LONG for sequence in (*old, between))
    server.step_until(lambda: new.decode.completion_ids)
    server.table.unload("x").result(10)
    made = server.ids(*old, between, new)
    assert made == [expected("lora"), expected("lora"), expected("full"), expected("full2"), expected("lora2")]
    server.check(chat="base", math="full")


def test_a_preempted_request_resumes_on_the_old_weights(world, server):
    (worker,) = server.engine.decode_workers
    taken = worker.pool.manager.allocate(50)
    server.load("x", "lora")
    old = [server.ask("x"), server.ask("x")]
    server.step_until(lambda: old[1].state is State.PREEMPTED)
    assert old[1].decode.completion_ids
    server.load("x", "lora2", True)
    new = server.ask("x")
    server.step_until(lambda: new.final)
    worker.pool.manager.release(taken)
    assert server.ids(*old, new) == [world.expected("lora")] * 2 + [world.expected("lora2")]
    server.table.unload("x").result(10)


def test_prompt_kv_is_shared_with_new_tasks(world, server):
    """A task loaded later reuses the prompt KV of others."""
    server.check(math="full")
    server.load("x", "lora")
    sequence = server.ask("x")
    assert server.ids(sequence) == [world.expected("lora")]
    assert sequence.cached_tokens == 8
    server.table.unload("x").result(10)


# --- errors ----------------------------------------------------------------------------------------------------------


def without(path: Path, part: str) -> None:
    tensors = load_file(path)
    del tensors[next(name for name in tensors if part in name)]
    save_file(tensors, path)


def with_tensor(path: Path, name: str) -> None:
    save_file({**load_file(path), name: np.zeros((2, 2), np.float32)}, path)


def misshapen(path: Path, part: str) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if part in name)
    save_file({**tensors, name: np.zeros((3, 5), np.float32)}, path)


FAULTS = [
    ("full", lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    ("lora", lambda folder: (folder / MANIFEST).write_text("{"), MANIFEST),
    ("full", lambda folder: edit_json(folder / MANIFEST, base_fingerprint="0" * 64), "another base"),
    ("lora", lambda folder: edit_json(folder / MANIFEST, base_fingerprint="0" * 64), "another base"),
    ("lora", lambda folder: edit_json(folder / MANIFEST, tokenizer="0" * 64), "tokenizer"),
    ("lora", lambda folder: edit_json(folder / MANIFEST, prefill="own"), "'own'"),
    ("full", lambda folder: without(folder / SINGLE_FILE, "up_proj"), "layers.0.mlp.up_proj.weight"),
    ("lora", lambda folder: without(folder / WEIGHTS_FILE, "v_proj.lora_B"), "v_proj.lora_B.weight"),
    ("full", lambda folder: with_tensor(folder / SINGLE_FILE, "surplus"), "surplus"),
    ("lora", lambda folder: with_tensor(folder / WEIGHTS_FILE, "surplus"), "surplus"),
    ("full", lambda folder: misshapen(folder / SINGLE_FILE, "model.norm"), "[3, 5]"),
    ("lora", lambda folder: misshapen(folder / WEIGHTS_FILE, "q_proj.lora_A"), "[3, 5]"),
    ("lora", lambda folder: edit_json(folder / CONFIG_FILE, use_dora=True), "use_dora"),
    ("full", lambda folder: (folder / SINGLE_FILE).write_bytes(b"nothing"), SINGLE_FILE),
    ("lora", lambda folder: (folder / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    ("full", lambda folder: [file.unlink() for file in folder.iterdir()], MANIFEST),
]


@pytest.mark.parametrize(("kind", "spoil", "fact"), FAULTS)
def test_modules_that_do_not_fit_are_refused_by_name(world, server, kind, spoil, fact):
    folder = world.modules / "bad"
    for file in (world.modules / kind).iterdir():
        folder.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(folder)
    weights = server.engine.decode_workers[0].tasks
    running = server.ask("math", 6)
    for name, in_place in (("new", False), ("math", True)):
        assert fact in server.refusal(name, "bad", in_place)
    assert server.served.tasks == ["chat", "math"]
    assert server.engine.decode_workers[0].tasks is weights
    assert server.ids(running) == [world.expected("full")[:6]]
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_a_missing_module(server):
    assert "nowhere" in server.refusal("new", "nowhere")


# --- memory ----------------------------------------------------------------------------------------------------------


def live() -> int:
    gc.collect()
    return len(jax.live_arrays())


def test_old_weights_are_freed_after_their_last_request(world):
    stepped = world.serve({"chat": "base", "math": "full", "tools": "lora2"})
    stepped.check(math="full")
    # Arrays that samplers keep for any batch size.
    compile_all(program for program in stepped.programs if program.name.startswith("sample"))
    before = live()
    (worker,) = stepped.engine.decode_workers
    num_base = sum(not is_stacked(path) for path in worker.tasks["chat"].params)
    # An adapter is a slot of arrays that there are already.
    for module, num_new in (("full2", num_base), ("lora", 0), ("same", 0)):
        stepped.load("x", module)
        assert live() == before + num_new, module
        weights = weakref.ref(worker.tasks["x"])
        sequence = stepped.ask("x", 6)
        stepped.step_until(lambda sequence=sequence: len(sequence.decode.completion_ids) == 2)
        stepped.table.unload("x").result(10)
        # A step is in flight: its tokens, and those that were its input.
        assert 0 <= live() - (before + num_new) <= 2
        assert weights() is not None
        assert len(stepped.ids(sequence)[0]) == 6
        del sequence
        # Its row is dropped in the worker's next turn.
        stepped.engine.step()
        assert live() == before, module
        assert weights() is None
    # Tasks of the config are freed too, even while programs wait to be compiled.
    assert stepped.programs
    old = weakref.ref(worker.tasks["math"])
    stepped.load("math", "lora", True)
    assert live() == before - num_base
    assert old() is None
    stepped.table.unload("tools").result(10)
    stepped.check(math="lora")
    stepped.table.stop()


def test_the_base_weights_are_stored_once(world, server):
    (worker,) = server.engine.decode_workers
    base = worker.tasks["chat"].params
    for name, module in (("a", "lora"), ("b", "lora2"), ("c", "same")):
        server.load(name, module)
        params = worker.tasks[name].params
        assert all(params[path] is array for path, array in base.items() if not is_stacked(path))
        assert {device.id for array in params.values() for device in array.devices()} == {3}
    assert worker.tasks["c"].params is worker.tasks["chat"].params is worker.tasks["a"].params
    for name in "abc":
        server.table.unload(name).result(10)


def test_a_failed_load_keeps_no_arrays(server, monkeypatch):
    before = live()

    def fail(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: made to fail")

    monkeypatch.setattr("pshare_jax.server.tasks.loader.decode_variants", fail)
    # pytest would keep the log record, and with it the arrays of the traceback.
    monkeypatch.setattr("pshare_jax.server.tasks.table.logger.exception", lambda *_: None)
    with pytest.raises(ApiError, match="memory") as caught:
        server.load("x", "full2")
    assert caught.value.status == 500
    del caught
    assert live() == before
    server.check(chat="base", math="full")


# --- compiling -------------------------------------------------------------------------------------------------------


def test_workers_never_compile_for_a_new_task(world, server):
    """New architectures (the first LoRA, other ranks and targets) are compiled before the task is served."""
    compile_all(server.programs)
    # The first adapter brings new steps, and programs that write its arrays.
    for name, brings in (("odd", True), ("lora2", None), ("full2", False), ("same", False)):
        before = count_compilations().count
        server.load("x", name)
        loaded = count_compilations().count
        assert brings is None or (loaded > before) is brings
        alone, *others = server.ask("x", 5), server.ask("chat", 5), server.ask("math", 5)
        server.ids(alone, *others)
        server.ids(*[server.ask("x", 5) for _ in range(3)])
        assert count_compilations().count == loaded, name
        server.table.unload("x").result(10)


@pytest.mark.parametrize("settled", [False, True])
def test_no_shape_is_used_before_it_is_compiled_for_the_new_task(world, monkeypatch, settled):
    """While the start still compiles, its pending shapes are compiled too; shapes that failed to compile never are."""
    compiled: list[str] = []

    def noted(side: Any, settings: Any) -> list[Variant]:
        return [
            replace(program, lower=functools.partial(Noted, program, compiled))
            for program in decode_variants(side, settings)
        ]

    monkeypatch.setattr("pshare_jax.server.tasks.loader.decode_variants", noted)
    stepped = world.serve({"chat": "base"})
    (worker,) = stepped.engine.decode_workers
    worker.compiled.limit([(1,)])
    if settled:
        BackgroundCompiler([], [worker.compiled], lambda line: None, lambda: None)._thread.join()
    stepped.load("x", "lora")
    one, two = ["decode 1", "sample 1"], ["decode 2", "sample 2", "score 1x64", "score 4x16"]
    assert sorted(compiled) == (one if settled else sorted(one + two))
    assert (2,) not in worker.compiled
    stepped.table.stop()


class Noted:
    """A program whose compilation is only recorded."""

    def __init__(self, variant: Variant, compiled: list[str]):
        self._variant, self._compiled = variant, compiled

    def compile(self) -> None:
        self._compiled.append(self._variant.name)


def test_programs_of_a_new_task_are_warmed_up_while_idle(world):
    stepped = world.serve({"chat": "base"})
    (worker,) = stepped.engine.decode_workers
    worker.compiled.limit([(1,), (2,)])
    while worker.warm_up():
        pass
    stepped.load("x", "lora")
    assert worker.next_cold is not None
    assert worker.next_cold[0] is worker.tasks["x"].current
    while worker.warm_up():
        pass
    stepped.check(x="lora")
    stepped.table.stop()


# --- the whole server ------------------------------------------------------------------------------------------------


def test_a_stream_finishes_on_the_old_weights_over_http(world):
    """The task is replaced in the middle of a stream whose steps wait for it."""
    stepped = world.serve({"x": "lora"}, server=ServerConfig(modules_dir=str(world.modules), api_key="key"))
    engine, served = stepped.engine, stepped.served
    (worker,) = engine.decode_workers
    reached, go, run = threading.Event(), threading.Event(), worker.pool.run

    def paced(*args: Any) -> Any:
        if any(len(sequence.decode.completion_ids) == 5 for sequence in engine.admission.decoding[0]):
            reached.set()
            assert go.wait(60)
        return run(*args)

    worker.pool.run = paced
    engine.start()
    body = {"prompt": world.prompt, "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    with answering(served) as (client, _):
        assert client.post("/v1/completions", json={"model": "x", **body}).status_code == 401
        client.headers["authorization"] = "Bearer key"
        with client.stream("POST", "/v1/completions", json={"model": "x", **body, "stream": True}) as response:
            assert reached.wait(30)
            asked = {"lora_name": "x", "lora_path": "full", "load_inplace": True}
            assert client.post("/v1/load_lora_adapter", json=asked).status_code == 200
            assert client.post("/v1/load_lora_adapter", json={**asked, "lora_name": "y"}).status_code == 200
            go.set()
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
        tokenizer = world.model.tokenizer
        assert text == tokenizer.decode(world.expected("lora"))
        for name in ("x", "y"):
            new = client.post("/v1/completions", json={"model": name, **body, "n": 2}).json()["choices"]
            assert [choice["text"] for choice in new] == [tokenizer.decode(world.expected("full"))] * 2
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "y"}).status_code == 200
        assert client.post("/v1/completions", json={"model": "y", **body}).status_code == 404
    stepped.table.stop()


@pytest.mark.parametrize("kind", ["isolated", "no worker for all"])
def test_servers_with_fixed_tasks_refuse_with_their_reason(world, kind):
    named = replace(PLACE, decode=[DecodePlacement([3], tasks=["chat"])])
    changes: dict[str, Any] = {"sharing": "isolated"} if kind == "isolated" else {"placement": named}
    stepped = world.serve({"chat": "base"}, **changes)
    fact = "sharing: isolated" if kind == "isolated" else "tasks: all"
    for change in (stepped.table.load("x", "lora", False), stepped.table.unload("chat")):
        with pytest.raises(ApiError, match=fact) as caught:
            change.result(10)
        assert caught.value.status == 400
    stepped.check(chat="base")
    stepped.table.stop()
