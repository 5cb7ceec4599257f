"""startup.py and cli.py in this process: placements other than the default, and mistakes told before serving."""

import socket
from typing import Any

import jax
import pytest
from tiny import tiny_module

import pshare_jax as ps
from pshare_jax.serving import cli, startup
from pshare_jax.serving.config import DecodePlacement, Placement, PrefillPlacement, ServeConfig
from pshare_jax.serving.request import Request

PROMPTS = [(5,), (5, 6, 7), tuple(range(40, 50))]


def placed(prefill, decode):
    return Placement(
        [PrefillPlacement(devices) for devices in prefill], [DecodePlacement(devices) for devices in decode]
    )


def build(config):
    return startup.build(config, lambda line: None)


def answers(engine, task, route=None):
    """The engine's ids for each prompt, stepped in turn."""
    ids = []
    for number, prompt in enumerate(PROMPTS):
        events = []
        request = Request(f"{task}-{number}", task, prompt, 5)
        engine.submit(request, events.append, route)
        sequence = engine._live[request.id]
        while engine.num_live:
            engine.step()
        assert events[-1].finish_reason == "length", events
        ids.append(sequence.completion_ids)
    return ids


@pytest.fixture(scope="module")
def world(tiny_folders, tmp_path_factory):
    """A base, its tasks, and the oracle's ids for every task and prompt."""
    base = tiny_folders["llama"]
    tasks = {"chat": "base", "math": str(tiny_module(base, tmp_path_factory.mktemp("module") / "math"))}
    shared = ps.factorize(ps.load(base))
    for name, source in tasks.items():
        shared.add_task(name, source)
    oracle = {
        name: [ps.generate(shared, name, prompt, max_new_tokens=5, stop_ids=()) for prompt in PROMPTS] for name in tasks
    }
    assert oracle["chat"] != oracle["math"]
    return str(base), tasks, oracle


@pytest.mark.parametrize(
    "placement",
    [None, placed([[0]], [[0]]), placed([[0, 1]], [[2]]), placed([[0], [1]], [[0], [1]])],
    ids=["default", "colocated", "tp2-tp1", "two-each"],
)
def test_every_route_equals_the_oracle(world, placement):
    base, tasks, oracle = world
    engine = build(ServeConfig(base, tasks, placement=placement)).engine
    routes = engine.all_routes()
    for route, task in routes:
        assert answers(engine, task, route) == oracle[task]
    assert sum(transfer.stats.count for transfer in engine.transfers) == len(routes) * len(PROMPTS)


def test_by_default_prefill_and_decode_are_on_disjoint_devices(world):
    base, tasks, _ = world
    engine = build(ServeConfig(base, tasks)).engine

    def devices(tree):
        return {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}

    prefill: Any = engine.prefill_workers[0]._module
    decode: Any = engine.decode_workers[0]._modules
    weights = [decode.module(name).params for name in tasks]
    assert devices(prefill.model.params) == {jax.devices()[0]}
    assert devices(weights) == {jax.devices()[1]}
    engine.submit(Request("r", "chat", (1, 2, 3), 5), lambda event: None)
    sequence = engine._live["r"]
    engine.prefill_workers[0].step()
    assert devices(sequence.kv.layers) == {jax.devices()[1]}
    while engine.num_live:
        engine.step()


def test_warm_up_reaches_every_task(world):
    base, tasks, _ = world
    served = build(ServeConfig(base, tasks, placement=placed([[0]], [[0]])))
    served.engine.start()
    startup.warm_up(served, lambda line: None)
    assert served.engine.transfers[0].stats.count == 4
    served.engine.stop()


def test_what_cannot_be_served_is_one_sentence(world, tmp_path):
    base, tasks, _ = world
    for config in (
        ServeConfig(str(tmp_path / "none"), tasks),
        ServeConfig(str(tmp_path), tasks),
        ServeConfig(base, {"chat": str(tmp_path / "none")}),
        ServeConfig(base, {"chat": base}),
        ServeConfig(base, tasks, placement=placed([[0, 1, 2]], [[3]])),
        ServeConfig(base, tasks, placement=placed([[0]], [[99]])),
    ):
        with pytest.raises(ps.PshareError, match=r"^[^\n]*$"):
            build(config)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("base: nothing\ntasks: {chat: base}\n")
    return str(path)


def test_print_config_prints_what_overrides_made_of_it(config_file, capsys):
    arguments = ["tasks.a/b.c=base", "--config", config_file, "--print-config", "server.port=0"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "  chat: base\n  a/b.c: base\n" in printed
    assert "  port: 0\n" in printed


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("server.prot=1", "Unknown key server.prot; server takes host, port"),
        ("kv.pages=1", "Unknown key kv; the config takes base, tasks"),
        ("server.port=x", "server.port must be a whole number"),
        ("sharing=isolated", "isolated is not offered yet"),
        ("server.host=256.0.0.1", "server.host '256.0.0.1' is not an address of this machine"),
        ("server.host=203.0.113.9", "Cannot listen on 203.0.113.9:8000: cannot assign requested address"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(config_file, capsys, override, sentence):
    assert cli.main(["--config", config_file, override]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.startswith("pshare-serve: ")
    assert captured.err.count("\n") == 1


def test_a_missing_config_file(capsys):
    assert cli.main(["--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "pshare-serve: There is no config file nowhere.yaml.\n"


def test_a_port_in_use_is_told_before_anything_is_loaded(config_file, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["--config", config_file, f"server.port={port}"]) == 2
    assert f"Cannot listen on 127.0.0.1:{port}: address already in use; choose" in capsys.readouterr().err
