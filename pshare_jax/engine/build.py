"""Builds an engine from a model and a config: weights, pools and samplers on every worker's mesh.

With `sharing: shared` every prefill worker has the base's weights; with `isolated`, the baseline, each task has a prefill
worker with its own weights (an activated LoRA's are the base's there). The LoRA adapters of a mesh are stacked
(share/adapter_stack.py). A mesh holds of the base only what its workers use (share/mesh_base.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from pshare_jax.engine.config import (
    DecodePlacement,
    EngineConfig,
    Placement,
    PrefillPlacement,
    check_engine_config,
    resolve,
    resolved,
    worker_tasks,
)
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import DecodeSpec, ModelFacts, Module, PrefillSpec, weights_of
from pshare_jax.engine.kv.budget import HOST_ROW_TOKENS, Holdings, PoolNeed, pages_that_fit, rooms, table
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.sampler import Sampler
from pshare_jax.engine.shapes import page_buckets, pages_for
from pshare_jax.engine.transfer import MAX_IN_FLIGHT
from pshare_jax.engine.warmup import largest_temporaries, variants
from pshare_jax.errors import PshareError
from pshare_jax.host_memory import free_host_memory
from pshare_jax.mesh import make_mesh, same_devices
from pshare_jax.model.kv.pages import page_bytes
from pshare_jax.model.sharding import check_tensor_parallel, parameter_sharding
from pshare_jax.share.adapter_stack import MeshStack
from pshare_jax.share.decode_module import DecodeModule, base_module, load_module
from pshare_jax.share.mesh_base import Bring, MeshBase
from pshare_jax.share.model import Model, Weights
from pshare_jax.text.grammar import GrammarCompiler
from pshare_jax.weights.load import Tensors

FEW_PAGES = 3
"""Pages of the pools of an engine that is only measured: a program's temporaries do not depend on them."""
PagesOf = Callable[[str, int], int]
"""(name of a pool, number of pools that divide the pages of its worker) -> its pages."""


def build_engine(
    model: Model, config: EngineConfig, report: Callable[[str], None], reload: Bring | None = None
) -> Engine:
    """The engine of a model, not started. `reload` brings the base to a mesh that comes to need it later; without it the
    engine keeps the model.

    Raises:
        PshareError: the config, the placement or a task does not fit the model, or the pools do not fit the devices.
    """
    check_engine_config(config)
    devices = jax.devices()
    config = resolve(config, devices[0].platform, len(devices))
    assert config.attention != "auto"
    model = model.with_attention(config.attention)
    if config.attention == "pallas":
        report("attention over pages by the Pallas kernel (attention: xla is plain XLA)")
    builder = EngineBuilder(model, config, report)
    builder.load()
    pages_of, temporaries = builder.configured, None
    if config.kv.pages == "auto":
        pages_of, temporaries = _measured(
            builder.engine(lambda name, neighbours: FEW_PAGES, model.config.max_len), config
        )
    engine = builder.engine(pages_of)
    for line in table(builder.holdings(engine), pool_needs(engine), temporaries, free_host_memory):
        report(line)
    builder.release(reload or model.on)
    return engine


def _measured(engine: Engine, config: EngineConfig) -> tuple[PagesOf, int | None]:
    """Pages of every pool by what the devices have left, and bytes of temporaries; the engine has all weights and small pools.

    On CPU the temporaries are not measured, since its share of the machine leaves room for them and the start must not wait.
    """
    needs, max_len, page_size = pool_needs(engine), engine.facts.max_len, config.kv.page_size
    measurable = all(device.memory_stats() for need in needs for device in need.devices)
    temporaries = largest_temporaries(variants(engine)) if measurable else None
    useful = resolved(config.limits.max_requests) * pages_for(max_len, page_size)
    if not measurable:
        useful = min(useful, pages_for(max(resolved(config.batch.decode_rows) * HOST_ROW_TOKENS, max_len), page_size))
    least = pages_for(engine.chunk_tokens, page_size) + 2
    room = rooms(needs, temporaries or 0, free_host_memory)
    most = max(least, useful + 1)
    pages = pages_that_fit(needs, room, least, most)
    return lambda name, neighbours: max(least, min(pages[name], most // neighbours)), temporaries


def pool_needs(engine: Engine) -> list[PoolNeed]:
    """What every pool of the engine takes of its devices."""
    prefill, decode = engine.prefill_specs, engine.decode_specs
    pools = {id(spec.pool): spec.pool for spec in (*prefill, *decode)}
    needs = []
    for pool in pools.values():
        store = DevicePages.of(pool)
        # Each decode worker's transfers are held on both sides.
        received = sum(spec.pool is pool and any(_sends(source, spec) for source in prefill) for spec in decode)
        sent = sum(any(source.pool is pool and _sends(source, spec) for source in prefill) for spec in decode)
        copies = (received + sent) * MAX_IN_FLIGHT * store.move_buckets[-1]
        needs.append(PoolNeed(pool.name, tuple(store.mesh.devices.flat), store.device_page_bytes, copies))
    return needs


def _sends(source: PrefillSpec, target: DecodeSpec) -> bool:
    """Whether pages of a prefill worker are moved to a decode worker."""
    common = source.tasks is None or not target.tasks.keys().isdisjoint(source.tasks)
    return source.pool is not target.pool and common


class EngineBuilder:
    """Builds the specs of all workers; the base and each task are loaded onto a mesh once."""

    def __init__(self, model: Model, config: EngineConfig, report: Callable[[str], None]):
        self._model, self._config, self._report = model, config, report
        self._grammars = GrammarCompiler(model.tokenizer, model.config.vocab_size)
        self._bases: dict[tuple[int, ...], MeshBase] = {}
        self._copies: dict[tuple[int, ...], Model] = {}
        self._encoders: dict[tuple[int, ...], Weights] = {}
        self._loaded: dict[tuple[int, ...], dict[str, DecodeModule]] = {}
        self._stacks: dict[tuple[int, ...], MeshStack] = {}
        self._served: dict[tuple[int, ...], Mapping[str, Any]] = {}

    @property
    def _placement(self) -> Placement:
        assert self._config.placement is not None
        return self._config.placement

    @property
    def _hosts(self) -> dict[str, PrefillPlacement]:
        """The prefill worker of each task in the isolated baseline."""
        workers = self._placement.prefill
        return {name: workers[i % len(workers)] for i, name in enumerate(self._config.tasks)}

    def load(self) -> None:
        """Puts on every mesh what its workers use of base and tasks."""
        if self._config.sharing == "isolated":
            for name, host in self._hosts.items():
                self._load_tasks(mesh_of(host), [name])
        else:
            for worker in self._placement.prefill:
                mesh = mesh_of(worker)
                self._encoders[devices_of(mesh)] = self._base_of(mesh).model().prefill_only()
        for worker in self._placement.decode:
            self._load_tasks(mesh_of(worker), worker_tasks(worker, list(self._config.tasks)))
        # All adapters of a mesh are known before they are stacked, in a stack that fits.
        for key, modules in self._loaded.items():
            stack = self._stacks[key] = MeshStack(self._bases[key])
            self._served[key] = stack.publish(stack.place(modules))
        self._loaded.clear()
        self._copies.clear()

    def release(self, bring: Bring) -> None:
        """Lets go of the model; what needs the base later asks `bring`."""
        for base in self._bases.values():
            base.bring = bring

    def engine(self, pages_of: PagesOf, max_len: int | None = None) -> Engine:
        """The engine with pools of these sizes. With a `max_len` it is only measured: its pools may be too small for that."""
        model, config = self._model, self._config
        isolated = config.sharing == "isolated"
        prefill, decode = self._isolated(pages_of) if isolated else self._shared(pages_of)
        # A prompt's last token needs no prefill page, but a common limit is simpler.
        most = min(spec.pool.num_usable for spec in (*prefill, *decode)) * config.kv.page_size
        fingerprint = model.fingerprint
        facts = ModelFacts(
            key_of=(lambda task: f"{fingerprint} {task}") if isolated else (lambda task: fingerprint),
            detokenizer=model.tokenizer.detokenizer,
            vocab_size=model.config.vocab_size,
            max_len=max_len or min(model.config.max_len, most),
            page_bytes=page_bytes(model.config, config.kv.page_size, model.architecture.dtype),
            stop_ids=model.stop_ids,
            grammars=self._grammars,
        )
        return Engine(prefill, decode, facts, config)

    def holdings(self, engine: Engine) -> Holdings:
        """The arrays of an engine of this builder."""
        bases = [array for base in self._bases.values() for array in base.arrays]
        modules = [weights for spec in engine.decode_specs for weights in weights_of(spec.tasks.values())]
        encoders = [spec.weights for spec in engine.prefill_specs]
        pools = {id(spec.pool): spec.pool for spec in (*engine.prefill_specs, *engine.decode_specs)}
        return Holdings(
            bases,
            [array for weights in (*modules, *encoders) for array in weights.params.values()],
            [array for pool in pools.values() for array in jax.tree.leaves(DevicePages.of(pool).pages)],
        )

    def _shared(self, pages_of: PagesOf) -> tuple[list[PrefillSpec], list[DecodeSpec]]:
        """A prefill worker with the base for each placement; a decode worker on the same devices shares its pool."""
        prefill = []
        for index, worker in enumerate(self._placement.prefill):
            mesh = mesh_of(worker)
            pool = self._pool(f"prefill pool {index}", mesh, pages_of)
            prefill.append(PrefillSpec(self._encoders[devices_of(mesh)], pool, worker.devices))
        decode = []
        for index, worker in enumerate(self._placement.decode):
            same = [spec.pool for spec in prefill if list(spec.devices) == worker.devices]
            pool = same[0] if same else self._pool(f"decode pool {index}", mesh_of(worker), pages_of)
            decode.append(self._decode_spec(worker, worker_tasks(worker, list(self._config.tasks)), pool))
        return prefill, decode

    def _isolated(self, pages_of: PagesOf) -> tuple[list[PrefillSpec], list[DecodeSpec]]:
        """A prefill worker and, if colocated, a decode worker for each task; together they have as many pages as the
        shared engine.
        """
        placement, hosts = self._placement, self._hosts
        prefill: list[PrefillSpec] = []
        for name, host in hosts.items():
            neighbours = sum(other is host for other in hosts.values())
            mesh = mesh_of(host)
            pool = self._pool(f"prefill pool of {name}", mesh, pages_of, neighbours)
            # An activated LoRA's prompt is encoded by the base.
            module = self._served[devices_of(mesh)][name]
            encoder = module.prefill_only() if isinstance(module, DecodeModule) else module.base or module
            prefill.append(PrefillSpec(encoder, pool, host.devices, [name]))
        decode: list[DecodeSpec] = []
        for index, worker in enumerate(placement.decode):
            tasks = worker_tasks(worker, list(hosts))
            pairs = [spec for spec in prefill if spec.devices == worker.devices]
            for spec in pairs:
                own = [name for name in spec.tasks or () if name in tasks]
                if own:
                    decode.append(self._decode_spec(worker, own, spec.pool))
            rest = [name for name in tasks if not any(name in (spec.tasks or ()) for spec in pairs)]
            if rest:
                pool = self._pool(f"decode pool {index}", mesh_of(worker), pages_of)
                decode.append(self._decode_spec(worker, rest, pool))
        return prefill, decode

    def _pool(self, name: str, mesh: Mesh, pages_of: PagesOf, neighbours: int = 1) -> Pool:
        page_size, dtype = self._config.kv.page_size, self._model.architecture.dtype
        platform = mesh.devices.flat[0].platform
        moves = page_buckets(pages_for(resolved(self._config.batch.prefill_tokens), page_size), platform)
        store = DevicePages(self._model.config, mesh, pages_of(name, neighbours), page_size, dtype, moves)
        return Pool(name, store, self._config.debug, self._config.kv.pinned_share)

    def configured(self, name: str, neighbours: int) -> int:
        """Pages of a pool by the config: `neighbours` pools divide a worker's."""
        pages = resolved(self._config.kv.pages) // neighbours
        if pages < 3:
            raise PshareError(f"kv.pages must be at least {3 * neighbours} for {neighbours} isolated prefill workers.")
        return pages

    def _decode_spec(self, worker: DecodePlacement, tasks: list[str], pool: Pool) -> DecodeSpec:
        mesh = mesh_of(worker)
        key = devices_of(mesh)
        served: dict[str, Module] = {name: self._served[key][name] for name in tasks}
        sampler = Sampler(mesh, self._model.config.vocab_size, resolved(self._config.batch.decode_rows))
        return DecodeSpec(served, pool, sampler, worker.devices, self._base_of(mesh), self._stacks[key])

    def _base_of(self, mesh: Mesh) -> MeshBase:
        check_tensor_parallel(self._model.config, mesh.size)
        return self._bases.setdefault(devices_of(mesh), MeshBase(self._model, mesh, self._copy))

    def _copy(self, mesh: Mesh, tensors: Tensors) -> Model:
        """The base on a mesh; while modules are loaded, one object for all."""
        if devices_of(mesh) not in self._copies:
            self._copies[devices_of(mesh)] = self._model.on(mesh, tensors)
        return self._copies[devices_of(mesh)]

    def _load_tasks(self, mesh: Mesh, tasks: list[str]) -> None:
        base, loaded = self._base_of(mesh), self._loaded.setdefault(devices_of(mesh), {})
        for name in tasks:
            if name not in loaded:
                source = self._config.tasks[name]
                self._report(f"adding the task {name} ({source if isinstance(source, str) else 'a module'})")
                loaded[name] = self._module(base, source)

    def _module(self, base: MeshBase, source: Any) -> DecodeModule:
        if isinstance(source, DecodeModule):
            return self._module_on(base, source.with_attention(self._model.architecture.build.attention))
        if source == "base":
            return base_module(base)
        return load_module(source, base, prefill="own" if self._config.sharing == "isolated" else "base")

    def _module_on(self, base: MeshBase, module: DecodeModule) -> DecodeModule:
        """A module in memory on the base's mesh; arrays that it has of the base are the base's there too."""
        mesh, config = base.outline.mesh, base.outline.config
        if same_devices(module.mesh, mesh):
            return module
        own = {path: array for path, array in module.params.items() if self._model.params.get(path) is not array}
        moved = jax.device_put(own, {path: parameter_sharding(path, config, mesh) for path in own})
        there = base.model() if len(own) < len(module.params) else base.outline
        params = {path: moved[path] if path in moved else there.params[path] for path in module.params}
        own_base = module.base and Weights(there.architecture, there.params, mesh)
        return replace(module, params=params, mesh=mesh, base=own_base)


def devices_of(mesh: Mesh) -> tuple[int, ...]:
    """Ids of a mesh's devices, which name it."""
    return tuple(device.id for device in mesh.devices.flat)


def mesh_of(worker: PrefillPlacement | DecodePlacement) -> Mesh:
    """The worker's mesh, tensor-parallel over exactly its devices."""
    return make_mesh(worker.devices)
