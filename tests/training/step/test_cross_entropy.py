"""The head's loss: chunks equal the whole, and on a mesh each device processes its own rows."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pshare_jax.training.config import MeshConfig
from pshare_jax.training.step import chunks
from pshare_jax.training.step.chunks import Head, chunk_tokens
from pshare_jax.training.step.cross_entropy import rows_nll, token_logprobs
from pshare_jax.training.step.mesh import training_mesh


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("num_tokens", "most"), [(1, 1), (7, 3), (8, 4), (9, 100)])
def test_chunks_of_the_head_equal_the_whole(tied, softcap, num_tokens, most, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", most * 33)
    draw = np.random.default_rng(num_tokens)
    hidden, weight = draw.normal(size=(num_tokens, 6)), draw.normal(size=(33, 6) if tied else (6, 33)) * 2
    targets, real = draw.integers(0, 33, num_tokens), draw.integers(0, 2, num_tokens)
    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, weight)]

    def whole(hidden, weight):
        logits = hidden @ (weight.T if tied else weight)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[:, None], axis=1)[:, 0]
        return -(chosen * real).sum(), (logits.argmax(-1) == targets) @ jnp.asarray(real)

    def ours(hidden, weight, weight_grad=True):
        integers, mask = jnp.asarray(targets, jnp.int32), jnp.asarray(real, jnp.float32)
        head = Head(weight, training_mesh(MeshConfig()), tied, softcap, weight_grad)
        return rows_nll(head, hidden[None], integers[None], mask[None])

    whole, ours = jax.jit(whole), jax.jit(ours, static_argnums=2)
    (total, correct), slopes = jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(*arrays)
    (expected, right), wanted = jax.value_and_grad(whole, argnums=(0, 1), has_aux=True)(*arrays)
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    assert float(correct) == float(right) == float(ours(*arrays)[1])
    for ours_slope, wanted_slope in zip(slopes, wanted, strict=True):
        np.testing.assert_allclose(ours_slope, wanted_slope, atol=1e-5)
    frozen = jax.grad(lambda hidden: 3 * ours(hidden, arrays[1], False)[0])(arrays[0])
    np.testing.assert_allclose(frozen, 3 * wanted[0], atol=3e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", [(), (2, 2, 1)], ids=["one", "rows"])
def test_single_log_probabilities_equal_the_whole(tied, softcap, shape, monkeypatch):
    """Also with weights of any sign, by which an objective combines them."""
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 5 * 33)
    draw = np.random.default_rng(3)
    hidden, weight = draw.normal(size=(4, 9, 6)), draw.normal(size=(33, 6) if tied else (6, 33)) * 2
    targets, factors = draw.integers(0, 33, (4, 9)), jnp.asarray(draw.normal(size=(4, 9)), jnp.float32)
    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, weight)]
    mesh = training_mesh(MeshConfig(*shape))

    def whole(hidden, weight):
        logits = hidden @ (weight.T if tied else weight)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], axis=2)[..., 0]
        return jnp.sum(jnp.sin(logprobs) * factors), (logprobs, logits.argmax(-1) == targets)

    def ours(hidden, weight, trained=True):
        logprobs, hits = token_logprobs(Head(weight, mesh, tied, softcap, trained), hidden, jnp.asarray(targets))
        return jnp.sum(jnp.sin(logprobs) * factors), (logprobs, hits)

    found, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(*arrays) for f in (ours, whole))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)
    frozen = jax.jit(jax.grad(lambda hidden: ours(hidden, arrays[1], False)[0]))(arrays[0])
    np.testing.assert_allclose(frozen, expected[1][0], atol=2e-5)


def test_chunks_are_even():
    assert chunk_tokens(5, 1) == 5
    assert chunk_tokens(1000, 1 << 18) == 125
    assert chunk_tokens(129, 1 << 18) == 65


ROWS, TOKENS, SIZE = 8, 12, 16


def at_head(mesh, tied: bool, vocab: int) -> tuple[Any, str]:
    """Loss, hits and gradients of a batch on the mesh, and the compiled program."""
    draw = np.random.default_rng(vocab)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    columns = None if vocab % 2 else "model"
    whole = NamedSharding(mesh, PartitionSpec(columns, "fsdp") if tied else PartitionSpec("fsdp", columns))
    hidden = draw.normal(size=(ROWS, TOKENS, SIZE)).astype(np.float32)
    weight = draw.normal(size=(vocab, SIZE) if tied else (SIZE, vocab)).astype(np.float32)
    targets = draw.integers(0, vocab, (ROWS, TOKENS)).astype(np.int32)
    real = draw.integers(0, 2, (ROWS, TOKENS)).astype(np.float32)

    def loss(hidden, weight, targets, real):
        return rows_nll(Head(weight, mesh, tied, None, True), hidden, targets, real)

    slope = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
        out_shardings=(NamedSharding(mesh, PartitionSpec()), (rows, whole)),
    )
    arrays = jax.device_put((hidden, weight, targets, real), (rows, whole, rows, rows))
    text = slope.lower(*arrays).compile().as_text()
    assert text is not None
    return jax.device_get(slope(*arrays)), text


@pytest.mark.parametrize(
    ("tied", "vocab", "shape"), [(True, 97, (2, 1, 1)), (True, 97, (2, 2, 2)), (False, 128, (2, 2, 2))]
)
def test_devices_process_their_own_rows(tied, vocab, shape, monkeypatch):
    """No device gathers hidden states or targets, and each has its share of the chunks; an odd vocabulary is replicated."""
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 8 * vocab)
    alone, single = at_head(training_mesh(MeshConfig()), tied, vocab)
    shared, text = at_head(training_mesh(MeshConfig(*shape)), tied, vocab)
    for ours, theirs in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", text)
    # Only the weight is gathered, over fsdp.
    assert all(str(SIZE) in shape.split(",") and str(TOKENS) not in shape.split(",") for shape in gathered), gathered
    assert len(gathered) <= 1
    assert num_chunks(single) == ROWS * TOKENS // 8
    assert num_chunks(text) == ROWS * TOKENS // 8 // (shape[0] * shape[1])


def num_chunks(text: str) -> int:
    """Iterations of the only loop of the program."""
    (count,) = {int(count) for count in re.findall(r'known_trip_count":\{"n":"(\d+)"', text)}
    return count
