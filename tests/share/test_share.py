"""The factorised model: prefill in pieces, KV shared by several tasks, donation, meshes, errors."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from tiny import assert_close, random_tokens, tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.model.kv.dense import DenseKV, bucket
from pshare_jax.model.sharding import kv_sharding
from pshare_jax.share.factorize import CHUNK


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> ps.SharedModel:
    """A tiny factorised Gemma 3 with a base task and a full task; its sliding window is shorter than the prompts."""
    root = tmp_path_factory.mktemp("shared")
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    folder = tiny_folder("gemma3", root / "base", max_position_embeddings=1024, **layers)
    shared = ps.factorize(ps.load(folder))
    shared.add_task("base", "base")
    shared.add_task("tuned", tiny_module(folder, root / "tuned"))
    return shared


def used(kv: DenseKV) -> list[np.ndarray]:
    """The arrays of a KV without its undefined slots."""
    return [np.array(x[:, :, : kv.length]) for layer in kv.layers for x in layer]


def assert_same_kv(ours: DenseKV, theirs: DenseKV) -> None:
    assert ours.length == theirs.length
    for our, their in zip(used(ours), used(theirs), strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-4)


def split_cases() -> list[tuple[int, list[int]]]:
    """(length, split points): page and bucket borders, both ends, several pieces, chunk borders."""
    short = [(40, [at]) for at in (0, 1, 15, 16, 17, 39, 40)] + [(40, [15, 16, 17]), (40, [0, 16, 32])]
    return short + [(CHUNK + 18, [at]) for at in (CHUNK - 1, CHUNK, CHUNK + 1)]


@pytest.mark.parametrize(("length", "splits"), split_cases(), ids=str)
def test_prefill_in_pieces(shared, length, splits):
    """The KV is the same for any split (A2-21, dense)."""
    tokens = random_tokens(length, 2, length)
    whole = shared.prefill(tokens)
    kv = shared.prefill(tokens[:, : splits[0]])
    for start, end in zip(splits, [*splits[1:], length], strict=True):
        assert kv.length == start
        kv = shared.prefill(tokens[:, start:end], kv)
    assert_same_kv(kv, whole)


def test_decode_after_pieces(shared):
    """Attention never sees the padding that earlier pieces left in later slots."""
    tokens = random_tokens(10, 2, 40)
    kv = shared.prefill(tokens[:, 15:], shared.prefill(tokens[:, :15]))
    whole = shared.prefill(tokens)
    assert kv.capacity == whole.capacity
    logits, _ = shared.decode("tuned", tokens[:, :1], kv)
    expected, _ = shared.decode("tuned", tokens[:, :1], whole)
    assert_close(logits, expected)


def test_rows_do_not_see_each_other(shared):
    tokens = random_tokens(0, 2, 20)
    both = shared.prefill(tokens)
    for row in (0, 1):
        single = shared.prefill(tokens[row : row + 1])
        for ours, batched in zip(used(single), used(both), strict=True):
            np.testing.assert_allclose(ours[0], batched[row], rtol=1e-5, atol=1e-5)


def test_prefill_does_not_change_the_kv_that_it_extends(shared):
    tokens = random_tokens(1, 1, 20)
    first = shared.prefill(tokens[:, :9])
    before = used(first)
    for _ in range(2):
        assert_same_kv(shared.prefill(tokens[:, 9:], first), shared.prefill(tokens))
    for old, new in zip(before, used(first), strict=True):
        np.testing.assert_array_equal(old, new)


def test_donation_does_not_change_results(shared):
    tokens = random_tokens(2, 2, 25)
    kv = shared.prefill(tokens[:, :20])
    expected, after = shared.decode("tuned", tokens[:, 20:21], kv)
    logits, donated = shared.decode("tuned", tokens[:, 20:21], kv.copy(), donate=True)
    np.testing.assert_array_equal(logits, expected)
    for old, new in zip(used(after), used(donated), strict=True):
        np.testing.assert_array_equal(old, new)
    # The first KV is still usable.
    again, _ = shared.decode("tuned", tokens[:, 20:21], kv)
    np.testing.assert_array_equal(again, expected)


def test_two_tasks_from_one_kv(shared):
    """Alternating tasks and separate tasks give the same logits."""
    tokens = random_tokens(4, 1, 26)
    kv = shared.prefill(tokens[:, :20])

    def separate(task: str) -> np.ndarray:
        return np.asarray(shared.decode(task, tokens[:, 20:], shared.prefill(tokens[:, :20]))[0])

    caches, logits = {"base": kv, "tuned": kv}, {"base": [], "tuned": []}
    for at in range(20, 26):
        for task in caches:
            step, caches[task] = shared.decode(task, tokens[:, at : at + 1], caches[task])
            logits[task].append(step)
    for task, steps in logits.items():
        assert_close(np.concatenate(steps, axis=1), separate(task))
    assert np.abs(separate("base") - separate("tuned")).max() > 0.1
    assert kv.length == 20


def test_decode_from_empty_kv(shared):
    """For a prompt of one token the base encodes nothing."""
    kv = shared.transfer(shared.prefill(np.zeros((2, 0), int)))
    assert (kv.length, kv.batch, kv.nbytes) == (0, 2, 0)
    tokens = random_tokens(5, 2, 7)
    logits, kv = shared.decode("base", tokens, kv)
    assert kv.length == 7
    assert_close(logits, shared.model.logits(tokens))


def test_size_of_the_kv(shared):
    config = shared.config
    kv = shared.prefill(random_tokens(6, 2, 21))
    assert kv.nbytes == 2 * 21 * 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    assert kv.capacity == bucket(21) == 32
    assert kv.grown(20) is kv
    assert (kv.grown(33).capacity, kv.grown(33).length) == (64, 21)


def test_disjoint_meshes(tiny_folders):
    """Invariant 8: prefill and decode arrays are on disjoint devices, and transferred KV has the decode sharding."""
    model = ps.load(tiny_folders["llama"])
    shared = ps.factorize(model, prefill_mesh=ps.make_mesh([2, 3]), decode_mesh=ps.make_mesh([5]))
    shared.add_task("base", "base")
    kv = shared.prefill(random_tokens(8, 1, 5))
    moved = shared.transfer(kv)

    def devices(tree: Any) -> set[int]:
        return {device.id for leaf in jax.tree.leaves(tree) for device in leaf.devices()}

    assert devices(kv.layers) == devices(shared.model.params) == {2, 3}
    assert devices(moved.layers) == devices(shared.task_modules.module("base").params) == {5}
    assert {leaf.sharding for leaf in jax.tree.leaves(moved.layers)} == {
        kv_sharding(model.config, shared.task_modules.model.mesh)
    }
    logits, _ = shared.decode("base", [[3]], moved)
    assert devices(logits) == {5}
    # The source stays usable for other transfers.
    assert_same_kv(kv, moved)


def test_each_mesh_has_one_copy_of_the_base(tiny_folders):
    model = ps.load(tiny_folders["llama"])
    here = ps.factorize(model)
    assert here.model.params is model.params
    elsewhere = ps.factorize(model, decode_mesh=ps.make_mesh([1]))
    for name in ("one", "two"):
        here.add_task(name, "base")
        elsewhere.add_task(name, "base")
    assert here.task_modules.module("one").params is model.params
    copies = [elsewhere.task_modules.module(name).params for name in ("one", "two")]
    assert copies[0] is copies[1]
    assert copies[0] is not model.params


def test_tasks(shared):
    fresh = ps.factorize(shared.model)
    fresh.add_task("b", "base")
    fresh.add_task("a", ps.DecodeModule(shared.model.architecture, shared.model.params, shared.model.mesh))
    assert fresh.tasks == ("b", "a")
    with pytest.raises(PshareError, match=r"'math'.* b, a\."):
        fresh.decode("math", [[1]], shared.prefill([[1]]))
    with pytest.raises(PshareError, match="'a' exists"):
        fresh.add_task("a", "base")
    with pytest.raises(PshareError, match="name must not be empty"):
        fresh.add_task("", "base")


def test_errors_name_the_numbers(shared):
    kv = shared.prefill(random_tokens(9, 2, 4))
    long = dataclasses.replace(kv, length=1020)
    for call, part in (
        (lambda: shared.prefill([1, 2]), r"\[batch, length\]"),
        (lambda: shared.prefill([[320]]), "0 to 319"),
        (lambda: shared.prefill(np.zeros((1, 1025), int)), "1025 .* 1024"),
        (lambda: shared.prefill([[1] * 5] * 2, long), "1025 .* 1024"),
        (lambda: shared.decode("base", np.zeros((2, 0), int), kv), "at least one token"),
        (lambda: shared.decode("base", [[1] * 5] * 2, long), "1025 .* 1024"),
        (lambda: shared.decode("base", [[-1], [1]], kv), "0 to 319"),
        (lambda: shared.decode("base", [[1]], kv), "1 rows.* 2"),
        (lambda: shared.prefill([[1]], kv), "1 rows.* 2"),
    ):
        with pytest.raises(PshareError, match=part):
            call()


@pytest.mark.parametrize(("size", "expected"), [(0, 16), (1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (1000, 1024)])
def test_buckets(size, expected):
    assert bucket(size) == expected


def test_a_transferred_kv_and_its_source_are_separate(shared):
    kv = shared.prefill([[5, 6, 7]])
    moved, again = shared.transfer(kv), shared.prefill([[]], kv)
    for copy in (moved, again):
        shared.decode("base", [[8]], copy, donate=True)
    logits, _ = shared.decode("base", [[8]], kv)
    assert np.isfinite(np.asarray(logits)).all()


def test_module_on_other_devices_is_an_error(shared):
    base = shared.model
    elsewhere = base.on(ps.make_mesh([3]))
    with pytest.raises(PshareError, match="devices"):
        shared.add_task("elsewhere", ps.DecodeModule(base.architecture, elsewhere.params, elsewhere.mesh))
