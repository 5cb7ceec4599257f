"""From a config to a running engine: devices, weights on every worker's mesh, tasks, warm-up.

Called by the command line only. Everything here happens before the server answers, so it tells its progress.
"""

import queue
from collections.abc import Callable
from pathlib import Path

import jax

from pshare_jax.errors import PshareError
from pshare_jax.load import Model, load
from pshare_jax.mesh import make_mesh, virtual_cpu_devices
from pshare_jax.serving.api import Served
from pshare_jax.serving.config import Placement, ServeConfig, num_cpu_devices, resolve_placement, worker_tasks
from pshare_jax.serving.engine import DecodeSide, Engine, PrefillSide
from pshare_jax.serving.protocol import Limits
from pshare_jax.serving.request import Event, Request
from pshare_jax.share import DecodeModules, PrefillModule

Say = Callable[[str], None]
WARM_UP_LEN = 40
"""Tokens of the warm-up prompt: a short chat's, so that the first real one meets compiled shapes."""


def prepare_jax(config: ServeConfig, cache_folder: Path) -> None:
    """Splits the CPU as the placement needs and keeps compiled programs on disk; must run before JAX starts."""
    virtual_cpu_devices(num_cpu_devices(config))
    jax.config.update("jax_compilation_cache_dir", str(cache_folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def build(config: ServeConfig, say: Say) -> Served:
    """Loads the base once, puts it on every worker's mesh and adds the tasks; the engine is not started yet.

    Raises:
        PshareError: the placement, the base or a task cannot be served.
    """
    devices = jax.devices()
    placement = resolve_placement(config, devices[0].platform, len(devices))
    say(f"{len(devices)} {devices[0].platform} devices; {_told(placement)}")
    say(f"opening and loading the base {config.base}")
    meshes = [make_mesh(worker.devices, worker.tp or 1) for worker in [*placement.prefill, *placement.decode]]
    dtype = None if config.dtype == "auto" else config.dtype
    model = load(config.base, dtype=dtype, mesh=meshes[0])
    prefill = [
        PrefillSide(PrefillModule(model, mesh), worker.devices)
        for worker, mesh in zip(placement.prefill, meshes, strict=False)
    ]
    decode = []
    for worker, mesh in zip(placement.decode, meshes[len(prefill) :], strict=True):
        tasks = worker_tasks(worker, list(config.tasks))
        decode.append(DecodeSide(_modules(model, mesh, tasks, config, say), worker.devices, tasks))
    engine = Engine(prefill, decode, model.tokenizer.detokenizer, config.server.max_requests)
    limits = Limits(model.config.max_len, model.config.vocab_size, model.stop_ids)
    return Served(engine, list(config.tasks), model.tokenizer, limits, config.server.max_body_bytes)


def warm_up(served: Served, say: Say) -> None:
    """Two tokens from every task on every worker of a started engine, so that a short chat's shapes are compiled.

    Raises:
        PshareError: a task's first answer failed, such as for want of memory.
    """
    say("compiling")
    # Its half is built on first use, which must not stall the streams of others.
    served.tokenizer.encode("", allow_special=False)
    prompt = (0,) * min(WARM_UP_LEN, served.limits.max_len - 2)
    for number, (route, task) in enumerate(served.engine.all_routes()):
        for temperature in (0.0, 1.0):
            done: queue.SimpleQueue[Event] = queue.SimpleQueue()
            request = Request(f"warm-up-{number}-{temperature}", task, prompt, 2, temperature=temperature)
            served.engine.submit(request, done.put, route)
            event = done.get()
            while not event.last:
                event = done.get()
            if event.error is not None:
                raise PshareError(f"The first answer of the task {task!r} failed; the log above says why.")


def _modules(model: Model, mesh: jax.sharding.Mesh, tasks: list[str], config: ServeConfig, say: Say) -> DecodeModules:
    modules = DecodeModules(model, mesh)
    for name in tasks:
        say(f"adding the task {name} ({config.tasks[name]})")
        modules.add_task(name, config.tasks[name])
    return modules


def _told(placement: Placement) -> str:
    prefill = ", ".join(str(worker.devices) for worker in placement.prefill)
    decode = ", ".join(str(worker.devices) for worker in placement.decode)
    return f"prefill on {prefill}, decode on {decode}"
