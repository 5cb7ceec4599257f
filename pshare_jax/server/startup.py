"""From a config to a running engine: devices, weights on every worker's mesh, tasks, compiled programs, first answers.

Called by the command line alone, before the server starts answering; `report` is called with each line of progress.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from pshare_jax.compilation_cache import keep_programs
from pshare_jax.engine.build import mesh_of
from pshare_jax.engine.config import Placement, resolve_placement, resolved
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.handle import RequestFailed
from pshare_jax.engine.request import Request
from pshare_jax.engine.warmup import BackgroundCompiler, Variant, compile_all, variants
from pshare_jax.engine.worker_thread import POLL_SECONDS
from pshare_jax.errors import PshareError
from pshare_jax.mesh import virtual_cpu_devices
from pshare_jax.server.app import AppContext
from pshare_jax.server.compile_counter import count_compilations
from pshare_jax.server.config import ServeConfig, num_cpu_devices
from pshare_jax.server.openai.to_requests import Limits
from pshare_jax.server.tasks.loader import TaskLoader
from pshare_jax.server.tasks.styles import TaskStyles
from pshare_jax.server.tasks.table import TaskTable
from pshare_jax.share.adapter_stack import StackedModule
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.model import Model, load
from pshare_jax.text.grammar import Grammar
from pshare_jax.weights.load import Tensors

Report = Callable[[str], None]
WARM_UP_LEN = 40
"""Tokens of the warm-up prompt, as in a short chat."""


def prepare_jax(config: ServeConfig, cache_folder: Path) -> None:
    """Splits the CPU as the placement needs and keeps compiled programs on disk; must run before JAX is initialised."""
    virtual_cpu_devices(num_cpu_devices(config))
    keep_programs(cache_folder)
    count_compilations()


def build(config: ServeConfig, report: Report) -> tuple[AppContext, list[Variant]]:
    """Loads the base, puts it on every worker's mesh and adds the tasks; the engine is not started yet.

    Raises:
        PshareError: the placement, the base or a task cannot be served.
    """
    api_key = config.server.api_key or _key_from_environment()
    modules_dir = _checked_modules_dir(config, api_key)
    devices = jax.devices()
    placement = resolve_placement(config.placement, devices[0].platform, len(devices))
    report(f"{len(devices)} {devices[0].platform} devices; {_described(placement)}")
    report(f"opening and loading the base {config.base}")
    dtype = None if config.dtype == "auto" else config.dtype
    model = load(config.base, dtype=dtype, mesh=mesh_of(placement.prefill[0]))
    reload = functools.partial(_reload, config.base, model.architecture.dtype)
    engine = Engine.build(model, replace(config, tasks=config.modules), report, reload)
    styles = TaskStyles(config)
    for name, module in _modules(engine).items():
        styles.put(name, module.style)
    sizes = ", ".join(f"{pool.num_pages:,} in the {pool.name}" for pool in engine.pools)
    tokens = f"{engine.page_size} tokens, {engine.facts.page_bytes:,} bytes"
    report(f"KV pages ({tokens}): {sizes}; a prompt and its answer have at most {engine.facts.max_len:,} tokens")
    max_requests = resolved(engine.config.limits.max_requests)
    limits = Limits(engine.facts.max_len, model.config.vocab_size, model.stop_ids, max_requests)
    report("clients need the API key" if api_key else "clients need no API key")
    # Clients need not know the path of a folder.
    base = Path(config.base).name
    table = modules_dir and _task_table(config, placement, engine, modules_dir, styles)
    server = config.server
    served = AppContext(
        engine, model.tokenizer, limits, server.max_body_bytes, api_key, base, table, server.allowed_origins, styles.of
    )
    return served, variants(engine)


def _reload(base: str, dtype: str, mesh: Mesh, tensors: Tensors) -> Model:
    """The base from its source, for devices that had no use for all of it."""
    return load(base, dtype=dtype, mesh=mesh, tensors=tensors)


def _checked_modules_dir(config: ServeConfig, api_key: str | None) -> Path | None:
    if config.server.modules_dir is None:
        return None
    folder = Path(config.server.modules_dir)
    if not config.server.modules_dir or not folder.is_dir():
        raise PshareError(
            f"server.modules_dir {config.server.modules_dir!r} is not a folder; create it or leave the key out."
        )
    if api_key is None:
        raise PshareError(
            "server.modules_dir lets clients change the tasks, so it needs an API key: set server.api_key or PSHARE_API_KEY."
        )
    return folder


def _modules(engine: Engine) -> dict[str, DecodeModule | StackedModule]:
    """The modules of the engine's tasks."""
    loaded = [pair for spec in engine.decode_specs for pair in spec.tasks.items()]
    return {name: module for name, module in loaded if isinstance(module, DecodeModule | StackedModule)}


def _task_table(
    config: ServeConfig, placement: Placement, engine: Engine, modules_dir: Path, styles: TaskStyles
) -> TaskTable:
    open_workers = [index for index, worker in enumerate(placement.decode) if worker.tasks == "all"]
    refusal = None
    if config.sharing == "isolated":
        refusal = (
            "With sharing: isolated every task has a prefill worker of its own, so tasks cannot change at run time."
        )
    elif not open_workers:
        refusal = "No decode worker in placement has tasks: all, so tasks cannot change at run time."
    return TaskTable(engine, modules_dir, open_workers, TaskLoader(engine).load, refusal, styles.put)


def _key_from_environment() -> str | None:
    key = os.environ.get("PSHARE_API_KEY")
    if key is not None and not key.strip():
        raise PshareError("The environment variable PSHARE_API_KEY is empty; give it a key or unset it.")
    return key and key.strip()


def warm_up(served: AppContext, programs: list[Variant], full: bool, report: Report) -> BackgroundCompiler:
    """Compiles what a short chat needs, or with `full` everything, and runs a first answer of every task on every worker
    of a started engine; the rest is compiled in the background.

    Raises:
        PshareError: a task's first answer failed, for example out of memory.
    """
    now = [program for program in programs if full or program.small]
    report(f"compiling {len(now)} of {len(programs)} programs")
    compile_all(now)
    # Only now, since workers warm up the shapes that are known to be compiled.
    engine = served.engine
    ready = [worker.compiled for worker in engine.workers]
    for shapes in ready:
        shapes.limit(program.shape for program in now if program.shape is not None)
    # Part of the tokenizer is built on first use, which must not stall other requests' streams.
    served.tokenizer.encode("", allow_special=False, refuse_from=served.limits.max_len)
    # The name of no task has the style of those that are loaded later.
    for task in ("", *served.tasks):
        served.tokenizer.tool_format(served.style_of(task))
    if engine.facts.grammars is not None:
        engine.facts.grammars.check(Grammar.any_object())
    first_answers(served)
    while full and not engine.warm and engine.healthy:
        time.sleep(POLL_SECONDS)
    rest = [program for program in programs if program not in now]
    return BackgroundCompiler(rest, ready, report, engine.wake)


def first_answers(served: AppContext) -> None:
    """Generates two tokens with every task on every worker.

    Raises:
        PshareError: an answer failed.
    """
    max_len = served.limits.max_len
    for number, (route, task) in enumerate(served.engine.router.all_routes()):
        prompt = _warm_up_prompt(served.engine.boundary(task).invocation, max_len)
        # A salt of its own, so that no user's prompt hits the warm-up's KV.
        name, max_tokens = f"warm-up-{number}", min(2, max_len - len(prompt))
        request = Request(name, task, prompt, max_tokens, cache_salt=name)
        try:
            served.engine.submit(request, route=route).result()
        except RequestFailed:
            raise PshareError(f"The first answer of the task {task!r} failed; the log above says why.") from None


def _warm_up_prompt(invocation: tuple[int, ...], max_len: int) -> tuple[int, ...]:
    """A short prompt; it ends with an activated LoRA's invocation, so that its own weights answer."""
    room = max_len - 2 - len(invocation)
    return (0,) * min(WARM_UP_LEN, room) + invocation if room > 0 else (0,)


def _described(placement: Placement) -> str:
    prefill = ", ".join(str(worker.devices) for worker in placement.prefill)
    decode = ", ".join(str(worker.devices) for worker in placement.decode)
    return f"prefill on {prefill}, decode on {decode}"
