"""Builds an engine from a model and a config: weights, pools and samplers on every worker's mesh.

With `sharing: shared` every prefill worker has the base's weights; with `isolated`, the baseline, each task has a prefill
worker with its own weights (an activated LoRA's are the base's there).
"""

from collections.abc import Callable
from dataclasses import replace

import jax
from jax.sharding import Mesh

from pshare_jax.engine.config import (
    DecodePlacement,
    EngineConfig,
    Placement,
    PrefillPlacement,
    check_engine_config,
    resolve_placement,
    worker_tasks,
)
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import DecodeSpec, ModelFacts, Module, PrefillSpec
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.sampler import Sampler
from pshare_jax.engine.shapes import page_buckets, pages_for
from pshare_jax.errors import PshareError
from pshare_jax.mesh import make_mesh, same_devices
from pshare_jax.model.kv.pages import page_bytes
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.factorize import TaskModules
from pshare_jax.share.model import Model, Weights
from pshare_jax.text.grammar import GrammarCompiler


def build_engine(model: Model, config: EngineConfig, report: Callable[[str], None]) -> Engine:
    """The engine of a model, not started.

    Raises:
        PshareError: the config, the placement or a task does not fit the model.
    """
    check_engine_config(config)
    devices = jax.devices()
    config = replace(config, placement=resolve_placement(config.placement, devices[0].platform, len(devices)))
    builder = EngineBuilder(model, config, report)
    isolated = config.sharing == "isolated"
    prefill, decode = builder.isolated() if isolated else builder.shared()
    # A prompt's last token needs no prefill page, but a common limit is simpler.
    most = min(spec.pool.num_usable for spec in (*prefill, *decode)) * config.kv.page_size
    fingerprint = model.fingerprint
    facts = ModelFacts(
        key_of=(lambda task: f"{fingerprint} {task}") if isolated else (lambda task: fingerprint),
        detokenizer=model.tokenizer.detokenizer,
        vocab_size=model.config.vocab_size,
        max_len=min(model.config.max_len, most),
        page_bytes=page_bytes(model.config, config.kv.page_size, model.architecture.dtype),
        stop_ids=model.stop_ids,
        grammars=GrammarCompiler(model.tokenizer, model.config.vocab_size),
    )
    return Engine(prefill, decode, facts, config)


class EngineBuilder:
    """Builds the specs of all workers; the base and each task are loaded onto a mesh once."""

    def __init__(self, model: Model, config: EngineConfig, report: Callable[[str], None]):
        self._model, self._config, self._report = model, config, report
        self._models: dict[tuple[int, ...], Model] = {}
        self._loaded: dict[int, TaskModules] = {}

    @property
    def _placement(self) -> Placement:
        assert self._config.placement is not None
        return self._config.placement

    def shared(self) -> tuple[list[PrefillSpec], list[DecodeSpec]]:
        """A prefill worker with the base for each placement; a decode worker on the same devices shares its pool."""
        pages = self._config.kv.pages
        prefill = []
        for index, worker in enumerate(self._placement.prefill):
            base = self._base_on(mesh_of(worker))
            prefill.append(PrefillSpec(base, self._pool(f"prefill pool {index}", base.mesh, pages), worker.devices))
        decode = []
        for index, worker in enumerate(self._placement.decode):
            tasks = worker_tasks(worker, list(self._config.tasks))
            modules = self._modules(mesh_of(worker), tasks)
            same = [spec.pool for spec in prefill if list(spec.devices) == worker.devices]
            pool = same[0] if same else self._pool(f"decode pool {index}", modules.model.mesh, pages)
            decode.append(self._decode_spec(worker, modules, tasks, pool))
        return prefill, decode

    def isolated(self) -> tuple[list[PrefillSpec], list[DecodeSpec]]:
        """A prefill worker and, if colocated, a decode worker for each task; together they have as many pages as the
        shared engine.
        """
        placement, names = self._placement, list(self._config.tasks)
        hosts = {name: placement.prefill[i % len(placement.prefill)] for i, name in enumerate(names)}
        prefill: list[PrefillSpec] = []
        for name in names:
            modules = self._modules(mesh_of(hosts[name]), [name])
            neighbours = sum(host is hosts[name] for host in hosts.values())
            pool = self._pool(f"prefill pool of {name}", modules.model.mesh, self._share(neighbours))
            prefill.append(PrefillSpec(modules.module(name).encoder, pool, hosts[name].devices, [name]))
        decode: list[DecodeSpec] = []
        for index, worker in enumerate(placement.decode):
            tasks = worker_tasks(worker, names)
            pairs = [spec for spec, name in zip(prefill, names, strict=True) if hosts[name].devices == worker.devices]
            modules = self._modules(mesh_of(worker), tasks)
            for spec in pairs:
                own = [name for name in spec.tasks or () if name in tasks]
                if own:
                    decode.append(self._decode_spec(worker, modules, own, spec.pool))
            rest = [name for name in tasks if not any(name in (spec.tasks or ()) for spec in pairs)]
            if rest:
                pool = self._pool(f"decode pool {index}", modules.model.mesh, self._config.kv.pages)
                decode.append(self._decode_spec(worker, modules, rest, pool))
        return prefill, decode

    def _share(self, neighbours: int) -> int:
        """Pages of each pool when `neighbours` pools divide a worker's."""
        pages = self._config.kv.pages // neighbours
        if pages < 3:
            raise PshareError(f"kv.pages must be at least {3 * neighbours} for {neighbours} isolated prefill workers.")
        return pages

    def _pool(self, name: str, mesh: Mesh, num_pages: int) -> Pool:
        page_size, dtype = self._config.kv.page_size, self._model.architecture.dtype
        moves = page_buckets(pages_for(self._config.batch.prefill_tokens, page_size))
        store = DevicePages(self._model.config, mesh, num_pages, page_size, dtype, moves)
        return Pool(name, store, self._config.debug, self._config.kv.pinned_share)

    def _decode_spec(self, worker: DecodePlacement, modules: TaskModules, tasks: list[str], pool: Pool) -> DecodeSpec:
        base = modules.model
        served: dict[str, Module] = {name: modules.module(name) for name in tasks}
        return DecodeSpec(served, pool, Sampler(base.mesh, base.config.vocab_size), worker.devices, base)

    def _base_on(self, mesh: Mesh) -> Model:
        devices = tuple(device.id for device in mesh.devices.flat)
        if devices not in self._models:
            self._models[devices] = self._model.on(mesh)
        return self._models[devices]

    def _modules(self, mesh: Mesh, tasks: list[str]) -> TaskModules:
        base = self._base_on(mesh)
        if id(base) not in self._loaded:
            prefill = "own" if self._config.sharing == "isolated" else "base"
            self._loaded[id(base)] = TaskModules(base, prefill=prefill)
        modules = self._loaded[id(base)]
        for name in tasks:
            if name not in modules.tasks:
                source = self._config.tasks[name]
                self._report(f"adding the task {name} ({source if isinstance(source, str) else 'a module'})")
                modules.add_task(name, self._module_on(base, source) if isinstance(source, DecodeModule) else source)
        return modules

    def _module_on(self, base: Model, module: DecodeModule) -> DecodeModule:
        """A module in memory on the base's mesh; arrays that it has of the base are the base's there too."""
        if same_devices(module.mesh, base.mesh):
            return module
        own = {path: array for path, array in module.params.items() if self._model.params.get(path) is not array}
        moved = jax.device_put(own, {path: parameter_sharding(path, base.config, base.mesh) for path in own})
        params = {path: moved[path] if path in moved else base.params[path] for path in module.params}
        own_base = module.base and Weights(base.architecture, base.params, base.mesh)
        return replace(module, params=params, mesh=base.mesh, base=own_base)


def mesh_of(worker: PrefillPlacement | DecodePlacement) -> Mesh:
    """The worker's mesh, tensor-parallel over exactly its devices."""
    return make_mesh(worker.devices)
