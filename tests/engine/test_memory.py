"""What devices hold: pages by measure, weights that are used and no others, equal tensors once."""

import gc
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from task_world import World
from tiny import FAMILIES, tiny_folder, tiny_module
from whole_steps import whole_prefill

import pshare_jax as ps
from pshare_jax.engine import build
from pshare_jax.engine.config import BatchConfig, EngineConfig, KVConfig, placed
from pshare_jax.engine.interfaces import weights_of
from pshare_jax.engine.kv.budget import PoolNeed, Room, pages_that_fit
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.shapes import padded_batch
from pshare_jax.engine.warmup import largest_temporaries, variants
from pshare_jax.model.decoder import prefill_reads
from pshare_jax.server import startup
from pshare_jax.server.config import ServeConfig, ServerConfig
from pshare_jax.share.mesh_base import MeshBase

BATCH = BatchConfig(prefill_tokens=32, decode_rows=2)
SPLIT, COLOCATED = placed([[4]], [[5]]), placed([[4]], [[4]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base without tied embeddings, and modules of it: LoRA, full, and full but for embedding and first layer."""
    root = tmp_path_factory.mktemp("memory")
    base = tiny_folder("llama", root / "base", num_hidden_layers=2, tie_word_embeddings=False)
    for kind in ("lora", "full"):
        tiny_module(base, root / kind, kind=kind)
    for seed in (1, 2):
        model, full = ps.load(base), ps.load_module(root / "full", ps.load(base))
        frozen = {path: model.params[path] for path in model.params if is_frozen(path)}
        params = {path: array + seed for path, array in full.params.items()} | frozen
        ps.save_module(root / f"frozen{seed}", ps.DecodeModule(model.architecture, params, model.mesh), model)
    return root


def is_frozen(path):
    return path == "embedding.weight" or path.startswith("layers.0.")


def built(
    folders,
    *tasks,
    placement=SPLIT,
    pages: int | Literal["auto"] = 40,
    sharing: Literal["shared", "isolated"] = "shared",
):
    """An engine whose model is gone, as a server's, and the lines of its report."""
    source, lines = folders / "base", []
    sources = {task: task if task == "base" else str(folders / task) for task in tasks}
    config = EngineConfig(tasks=sources, placement=placement, kv=KVConfig(4, pages), batch=BATCH, sharing=sharing)
    reload = lambda mesh, tensors: ps.load(source, mesh=mesh, tensors=tensors)  # noqa: E731
    engine = ps.Engine.build(ps.load(source, mesh=ps.make_mesh([4])), config, lines.append, reload)
    gc.collect()
    return engine, lines


# --- pages by measure ------------------------------------------------------------------------------------------------


def test_temporaries_do_not_depend_on_pages_and_the_largest_step_has_the_largest(folders):
    """So an engine with few pages can be measured before the pools are made."""
    sizes = []
    for pages in (40, 400):
        engine, _ = built(folders, "base", pages=pages)
        engine.facts = replace(engine.facts, max_len=156)
        steps = {program.name: program for program in variants(engine) if program.shape is not None}
        sizes.append({name: temporaries(program) for name, program in steps.items() if pages == 40 or name in LARGEST})
    assert sizes[1] == {name: sizes[0][name] for name in LARGEST}
    assert {name.split()[0] for name in sizes[0]} == {name.split()[0] for name in LARGEST}
    lowered = []
    programs = [noted(program, lowered) for program in steps.values()]
    assert largest_temporaries(programs) == max(sizes[0].values()) > 0
    assert sorted(lowered) == sorted(LARGEST)


LARGEST = ["decode 2", "prefill 1x32", "prefill 2x16", "sample 2", "score 1x64", "score 4x16"]


def temporaries(program):
    return program.lower().compile().memory_analysis().temp_size_in_bytes


def noted(program, lowered):
    def lower():
        lowered.append(program.name)
        return program.lower()

    return replace(program, lower=lower)


def test_pages_on_a_cpu_are_a_quarter_of_what_is_free_and_no_more_than_useful(folders, monkeypatch):
    page = DevicePages.of(built(folders, "base")[0].pools[0]).device_page_bytes
    for placement, num_pools in ((SPLIT, 2), (COLOCATED, 1)):
        monkeypatch.setattr(build, "free_host_memory", lambda: 4 * 2 * 60 * page)
        engine, lines = built(folders, "base", "full", placement=placement, pages="auto")
        assert [pool.num_pages for pool in engine.pools] == [120 // num_pools] * num_pools
        assert len(lines) == 2 + 1 + num_pools + 1
        assert float(lines[-1].split()[-1].replace(",", "")) == round(480 * page / 2**20)
    monkeypatch.setattr(build, "free_host_memory", lambda: 10**12)
    engine, _ = built(folders, "base", pages="auto")
    # 1,024 tokens for each of two rows, and the padding page.
    assert [pool.num_pages for pool in engine.pools] == [513, 513]
    isolated, _ = built(folders, "base", "full", pages="auto", sharing="isolated", placement=COLOCATED)
    assert not any(need.pages_in_flight for need in build.pool_needs(isolated))
    # As many in all.
    assert [pool.num_pages for pool in isolated.pools] == [256, 256]
    monkeypatch.setattr(build, "free_host_memory", lambda: 4 * 2 * 9 * page)
    with pytest.raises(ps.PshareError, match=r"^the prefill pool 0 would have 9 KV pages of .* at least 10: [^\n]*$"):
        built(folders, "base", pages="auto")


def test_pages_on_accelerators_are_what_weights_programs_and_transfers_leave(folders, monkeypatch):
    """The measured path on CPU devices that claim memory of their own."""
    limits, needs_of = {4: 10_000_000, 5: 20_000_000}, build.pool_needs
    used = 4_000_000

    def needs(engine):
        return [need.__class__(need.name, tuple(map(claimed, need.devices)), *_rest(need)) for need in needs_of(engine)]

    def claimed(device):
        return Claimed(device.id, "gpu", limits[device.id], used)

    # Pages for the longest sequence, on whose page table temporaries do depend.
    engine, _ = built(folders, "base", pages=200)
    expected_temporaries = largest_temporaries(variants(engine))
    page = DevicePages.of(engine.pools[0]).device_page_bytes
    largest_move = DevicePages.of(engine.pools[0]).move_buckets[-1]
    monkeypatch.setattr(build, "pool_needs", needs)
    engine, lines = built(folders, "base", pages="auto")
    left = [limit - used - expected_temporaries - 16 * largest_move * page for limit in limits.values()]
    for pool, part in zip(engine.pools, left, strict=True):
        # Rounded down to a coarse number.
        assert 7 / 8 < pool.num_pages / (int(part * 0.9) // page) <= 1
        assert pool.num_pages % (1 << pool.num_pages.bit_length() - 4) == 0
    assert [line.split()[:3] for line in lines[2:]] == [["gpu", "4", "10"], ["gpu", "5", "19"]]


@dataclass(frozen=True)
class Claimed:
    """A device with memory of its own."""

    id: int
    platform: str
    limit: int
    used: int

    def memory_stats(self):
        return {"bytes_limit": self.limit, "bytes_in_use": self.used}


def _rest(need):
    return need.page_bytes, need.pages_in_flight


def test_a_page_on_a_device_is_its_share(folders):
    wide, _ = built(folders, "base", placement=placed([[4]], [[5, 6]]))
    for pool, devices in zip(wide.pools, (1, 2), strict=True):
        store = DevicePages.of(pool)
        shards = [shard.data.nbytes for array in jax.tree.leaves(store.pages) for shard in array.addressable_shards]
        assert sum(shards) == store.device_page_bytes * store.num_pages * devices


# --- who holds what --------------------------------------------------------------------------------------------------


def live():
    gc.collect()
    return {id(array): array for array in jax.live_arrays()}


def held(engine):
    """Arrays that the engine's pools and the weights of its workers' steps consist of."""
    weights = [weights for spec in engine.decode_specs for weights in weights_of(spec.tasks.values())]
    weights += [spec.weights for spec in engine.prefill_specs]
    pools = [array for pool in engine.pools for array in jax.tree.leaves(DevicePages.of(pool).pages)]
    return {id(array) for part in weights for array in part.params.values()} | {id(array) for array in pools}


@pytest.mark.parametrize(
    ("tasks", "placement", "sharing"),
    [
        (("base", "lora", "full"), SPLIT, "shared"),
        (("full", "frozen1"), SPLIT, "shared"),
        (("base", "lora", "full"), COLOCATED, "shared"),
        (("full",), COLOCATED, "shared"),
        (("base", "full"), SPLIT, "isolated"),
        (("lora", "full"), COLOCATED, "isolated"),
    ],
)
def test_every_array_belongs_to_a_pool_a_task_or_the_base_in_use(folders, tasks, placement, sharing):
    before = live()
    engine, _ = built(folders, *tasks, placement=placement, sharing=sharing)
    assert live().keys() - before.keys() == held(engine)


def test_a_decode_mesh_of_full_modules_has_no_base_and_a_prefill_mesh_no_head(folders):
    before, base = live(), ps.load(folders / "base")
    whole = sum(array.nbytes for array in base.params.values())
    frozen = sum(array.nbytes for path, array in base.params.items() if is_frozen(path))
    read = sum(array.nbytes for path, array in base.params.items() if prefill_reads(path, base.config))
    assert 0 < read < whole - base.params["head"].nbytes
    before |= live()
    engine, _ = built(folders, "full", "frozen1", "frozen2")
    new = [array for key, array in live().items() if key not in before]
    on_mesh = [
        sum(array.nbytes for array in new if {one.id for one in array.devices()} == {device}) for device in (4, 5)
    ]
    pools = [pool_bytes(pool) for pool in engine.pools]
    assert on_mesh == [read + pools[0], 3 * whole - frozen + pools[1]]


def test_a_running_engine_holds_no_more_but_its_samplers_rows(folders):
    before = live()
    engine, _ = built(folders, "base", "lora", "full")
    for task in ("base", "lora", "full"):
        engine.generate([[5, 6, 7]] * 3, task, max_tokens=4)
    rest = [array for key, array in live().items() if key not in held(engine) | before.keys()]
    # A row of logits for each slot and one more.
    assert max(array.nbytes for array in rest) <= 3 * engine.facts.vocab_size * 4
    assert len(rest) < 50


def small(arrays):
    """What programs and samplers keep between engines."""
    return {key for key, array in arrays.items() if array.nbytes < 20_000}


def pool_bytes(pool):
    return sum(array.nbytes for array in jax.tree.leaves(DevicePages.of(pool).pages))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_copy_has_what_prefill_reads_and_nothing_else(tiny_folders, family):
    model = ps.load(tiny_folders[family])
    store = DevicePages(model.config, model.mesh, 8, 4, model.architecture.dtype, (2,))
    tokens, rows = padded_batch((1, 8), 4)
    traced = jax.make_jaxpr(whole_prefill(model))(model.params, tokens, rows, store.pages)
    [call] = traced.jaxpr.eqns
    inner = call.params["jaxpr"].jaxpr
    # The second output are the pages.
    _, used = partial_eval.dce_jaxpr(inner, [True] * len(inner.outvars))
    paths = sorted(model.params)
    assert {path for path, is_used in zip(paths, used, strict=False) if is_used} == set(model.prefill_only().params)
    full = jax.tree.leaves(model.paged.prefill(model.params, tokens, rows, store.pages)[1])
    store.reset()
    part = jax.tree.leaves(model.paged.prefill(model.prefill_only().params, tokens, rows, store.pages)[1])
    assert all(np.array_equal(one, other) for one, other in zip(full, part, strict=True))
    with pytest.raises(KeyError, match=r"embedding\.weight"):
        model.architecture.bind({path: x for path, x in model.params.items() if path != "embedding.weight"})


# --- equal tensors ---------------------------------------------------------------------------------------------------


def test_tensors_that_equal_the_bases_are_the_same_arrays(folders):
    model = ps.load(folders / "base")
    frozen = ps.load_module(folders / "frozen1", model)
    same = {path for path, array in frozen.params.items() if array is model.params[path]}
    assert same == {path for path in model.params if is_frozen(path)}
    changed = ps.load_module(folders / "full", model)
    assert not any(array is model.params[path] for path, array in changed.params.items())
    assert all(np.array_equal(array, model.params[path]) == (path in same) for path, array in frozen.params.items())


def test_modules_share_tensors_on_a_mesh_without_a_base_and_a_base_takes_them_over(folders):
    source, brought = ps.load(folders / "base"), []
    mesh = ps.make_mesh([6])

    def bring(mesh, tensors):
        brought.append(len(tensors))
        return source.on(mesh, tensors)

    base = MeshBase(source, mesh, bring)
    modules = [ps.load_module(folders / name, base) for name in ("frozen1", "frozen2")]
    assert not brought
    num_frozen = sum(map(is_frozen, source.params))
    assert sum(modules[0].params[path] is modules[1].params[path] for path in source.params) == num_frozen
    assert len(base.arrays) == num_frozen
    lora = ps.load_module(folders / "lora", base)
    assert brought == [2 * len(source.params) - num_frozen]
    assert sum(lora.params[path] is modules[0].params[path] for path in source.params) == num_frozen
    assert len(base.arrays) == len(source.params)
    del lora
    gc.collect()
    assert len(base.arrays) == num_frozen
    del modules
    gc.collect()
    assert not base.arrays


def test_a_base_that_is_there_is_not_brought_again(folders):
    model = ps.load(folders / "base")
    base = MeshBase(model, model.mesh, lambda mesh, tensors: pytest.fail("the base is there"))
    assert all(base.model().params[path] is array for path, array in model.params.items())


def test_pages_of_two_starts_are_alike():
    """Though a little more of the machine is in use: other numbers of pages are other programs."""
    needs = [PoolNeed("pool", (0,), 10, 0)]
    pages = [pages_that_fit(needs, {0: Room(size, "")}, 10, 10**6)["pool"] for size in (50_000, 49_300)]
    assert pages == [4608, 4608]
    assert pages_that_fit(needs, {0: Room(119, "")}, 11, 10**6) == {"pool": 11}


def test_parameters_that_were_replaced_are_nobodys_equals(folders):
    model = ps.load(folders / "base")
    other = ps.DecodeModule(model.architecture, {}, model.mesh)
    assert other.params == {}
    changed = {path: jnp.zeros_like(array) for path, array in model.params.items()}
    odd = replace(model, params=changed)
    assert odd.hashes == {}
    loaded = ps.load_module(folders / "frozen1", odd)
    assert not any(array is changed[path] for path, array in loaded.params.items())
    assert len(model.hashes) == len(model.params)


# --- a server's tasks come and go ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def test_a_base_is_brought_for_the_first_lora_task_and_goes_with_the_last(world):
    before = live()
    server = world.serve({"math": "full"}, placed([[6]], [[7]]))
    alone = set(live())
    [spec] = server.engine.decode_specs
    assert not spec.base.arrays
    server.check(math="full")
    server.load("x", "lora")
    server.load("y", "lora2")
    assert len(spec.base.arrays) == len(world.model.params)
    server.check(math="full", x="lora", y="lora2")
    server.table.unload("x").result(10)
    gc.collect()
    assert len(spec.base.arrays) == len(world.model.params)
    server.table.unload("y").result(10)
    server.check(math="full")
    gc.collect()
    assert not spec.base.arrays
    extra = {key: array for key, array in live().items() if key not in alone | before.keys()}
    pools = {id(x) for pool in server.engine.pools for x in jax.tree.leaves(DevicePages.of(pool).pages)}
    assert not set(extra) - pools - small(extra)
    server.table.stop()


def test_a_base_whose_files_have_changed_is_not_brought(world, tmp_path):
    base = tiny_folder("llama", tmp_path / "base", num_hidden_layers=2)
    modules = tmp_path / "modules"
    for kind in ("full", "lora"):
        tiny_module(base, modules / kind, kind=kind)
    config = ServeConfig(
        base=str(base),
        tasks={"math": str(modules / "full")},
        placement=SPLIT,
        kv=KVConfig(4, 64),
        batch=BATCH,
        server=ServerConfig(api_key="key", modules_dir=str(modules)),
    )
    served, _ = startup.build(config, lambda line: None)
    assert served.task_table is not None
    other = tiny_folder("llama", tmp_path / "other", num_hidden_layers=2, seed=9)
    (other / "model.safetensors").replace(base / "model.safetensors")
    with pytest.raises(Exception, match="the base's files have changed since the server started"):
        served.task_table.load("x", str(modules / "lora"), False).result(60)
    served.task_table.stop()
