"""From a model, tasks and a placement to the sides of an engine: weights, pools and samplers on every worker's mesh.

Called by startup.py and by tests. `sharing` decides whose weights prefill: the base's on every prefill worker (shared), or
each task's own on a prefill worker of its own (isolated, the baseline).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from jax.sharding import Mesh

from pshare_jax.engine.config import BatchConfig, DecodePlacement, KVConfig, Placement, PrefillPlacement, worker_tasks
from pshare_jax.engine.engine import DecodeSpec, EngineSettings, PrefillSpec
from pshare_jax.engine.interfaces import Weights
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.router import Policy
from pshare_jax.engine.sampler import Sampler
from pshare_jax.engine.shapes import page_buckets, pages_for
from pshare_jax.errors import PshareError
from pshare_jax.mesh import make_mesh
from pshare_jax.model.kv.pages import page_bytes
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.factorize import TaskModules
from pshare_jax.share.model import Model


@dataclass(frozen=True)
class Plan:
    """What an engine is to be: the tasks' sources by name, and how they are served."""

    tasks: Mapping[str, str | DecodeModule]
    placement: Placement
    sharing: Literal["shared", "isolated"] = "shared"
    kv: KVConfig = KVConfig()
    batch: BatchConfig = BatchConfig()
    policy: Policy = "prefix"
    debug: bool = False
    max_requests: int = 256
    stall_seconds: float = 300.0


@dataclass(frozen=True)
class Sides:
    """Everything that an `Engine` is made of."""

    prefill: list[PrefillSpec]
    decode: list[DecodeSpec]
    settings: EngineSettings
    bases: list[Model]
    """The base as it lies with each decode worker."""


def assemble(model: Model, plan: Plan, say: Callable[[str], None]) -> Sides:
    """The sides of an engine.

    Raises:
        PshareError: a task or the placement does not fit the model.
    """
    make = _Isolated(model, plan, say) if plan.sharing == "isolated" else _Shared(model, plan, say)
    prefill, decode = make.sides()
    # Page 0 of a pool is for padding. A prompt's last token needs no prefill page, but one limit is easier told.
    most = min(side.pool.num_usable for side in (*prefill, *decode)) * plan.kv.page_size
    max_len = min(model.config.max_len, most)
    settings = EngineSettings(
        key_of=make.key_of(),
        vocab_size=model.config.vocab_size,
        max_len=max_len,
        page_bytes=page_bytes(model.config, plan.kv.page_size, model.architecture.dtype),
        chunk_tokens=min(plan.batch.prefill_tokens, max_len),
        max_rows=plan.batch.decode_rows,
        max_requests=plan.max_requests,
        stall_seconds=plan.stall_seconds,
        policy=plan.policy,
    )
    return Sides(prefill, decode, settings, make.bases)


class _Maker:
    """What both kinds of engine have in common."""

    def __init__(self, model: Model, plan: Plan, say: Callable[[str], None]):
        self.model, self.plan, self.say = model, plan, say
        self._models: dict[tuple[int, ...], Model] = {}
        self._loaded: dict[int, TaskModules] = {}
        self.bases: list[Model] = []

    def pool(self, name: str, mesh: Mesh, num_pages: int) -> Pool:
        kv = self.plan.kv
        most = pages_for(self.plan.batch.prefill_tokens, kv.page_size)
        store = DevicePages(
            self.model.config, mesh, num_pages, kv.page_size, self.model.architecture.dtype, page_buckets(most)
        )
        return Pool(name, store, self.plan.debug)

    def decode_side(self, worker: DecodePlacement, modules: TaskModules, tasks: list[str], pool: Pool) -> DecodeSpec:
        mesh = modules.model.mesh
        self.bases.append(modules.model)
        weights: dict[str, Weights] = {name: modules.module(name) for name in tasks}
        return DecodeSpec(weights, pool, Sampler(mesh, self.model.config.vocab_size), worker.devices)

    def on(self, mesh: Mesh) -> Model:
        """The base on a mesh, one copy whatever the number of workers there."""
        devices = tuple(device.id for device in mesh.devices.flat)
        if devices not in self._models:
            self._models[devices] = self.model.on(mesh)
        return self._models[devices]

    def modules(self, mesh: Mesh, tasks: list[str]) -> TaskModules:
        """The tasks' modules on a mesh, each loaded once there."""
        base = self.on(mesh)
        if id(base) not in self._loaded:
            self._loaded[id(base)] = TaskModules(base, prefill="own" if self.plan.sharing == "isolated" else "base")
        modules = self._loaded[id(base)]
        for name in tasks:
            if name not in modules.tasks:
                source = self.plan.tasks[name]
                self.say(f"adding the task {name} ({source if isinstance(source, str) else 'a module'})")
                modules.add_task(name, source)
        return modules


class _Shared(_Maker):
    """One prefill worker for each placement, with the base; a decode worker on the same devices shares its pool."""

    def key_of(self) -> Callable[[str], str]:
        # It outlives this object, and must keep neither it nor the tasks' weights.
        fingerprint = self.model.fingerprint
        return lambda task: fingerprint

    def sides(self) -> tuple[list[PrefillSpec], list[DecodeSpec]]:
        placement, pages = self.plan.placement, self.plan.kv.pages
        prefill = []
        for index, worker in enumerate(placement.prefill):
            base = self.on(mesh_of(worker))
            prefill.append(PrefillSpec(base, self.pool(f"prefill pool {index}", base.mesh, pages), worker.devices))
        decode = []
        for index, worker in enumerate(placement.decode):
            tasks = worker_tasks(worker, list(self.plan.tasks))
            modules = self.modules(mesh_of(worker), tasks)
            same = [side.pool for side in prefill if list(side.devices) == worker.devices]
            pool = same[0] if same else self.pool(f"decode pool {index}", modules.model.mesh, pages)
            decode.append(self.decode_side(worker, modules, tasks, pool))
        return prefill, decode


class _Isolated(_Maker):
    """One prefill worker and, where it is colocated, one decode worker for each task; together they have the shared
    engine's pages.
    """

    def key_of(self) -> Callable[[str], str]:
        fingerprint = self.model.fingerprint
        return lambda task: f"{fingerprint} {task}"

    def sides(self) -> tuple[list[PrefillSpec], list[DecodeSpec]]:
        placement, names = self.plan.placement, list(self.plan.tasks)
        hosts = {name: placement.prefill[i % len(placement.prefill)] for i, name in enumerate(names)}
        prefill: list[PrefillSpec] = []
        for name in names:
            modules = self.modules(mesh_of(hosts[name]), [name])
            neighbours = sum(host is hosts[name] for host in hosts.values())
            pool = self.pool(f"prefill pool of {name}", modules.model.mesh, self.share(neighbours))
            prefill.append(PrefillSpec(modules.module(name), pool, hosts[name].devices, [name]))
        decode: list[DecodeSpec] = []
        for index, worker in enumerate(placement.decode):
            tasks = worker_tasks(worker, names)
            pairs = [one for one, name in zip(prefill, names, strict=True) if hosts[name].devices == worker.devices]
            modules = self.modules(mesh_of(worker), tasks)
            for side in pairs:
                own = [name for name in side.tasks or () if name in tasks]
                if own:
                    decode.append(self.decode_side(worker, modules, own, side.pool))
            rest = [name for name in tasks if not any(name in (side.tasks or ()) for side in pairs)]
            if rest:
                pool = self.pool(f"decode pool {index}", modules.model.mesh, self.plan.kv.pages)
                decode.append(self.decode_side(worker, modules, rest, pool))
        return prefill, decode

    def share(self, neighbours: int) -> int:
        """Pages of one of so many pools that share a worker's number of them."""
        pages = self.plan.kv.pages // neighbours
        if pages < 3:
            raise PshareError(f"kv.pages {self.plan.kv.pages} is too few for {neighbours} isolated prefill workers.")
        return pages


def mesh_of(worker: PrefillPlacement | DecodePlacement) -> Mesh:
    """The worker's mesh, tensor-parallel over exactly its devices."""
    return make_mesh(worker.devices)
