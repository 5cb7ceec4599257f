"""Cross-entropy at the head without ever holding the logits of all tokens: chunk by chunk, gradients in the same pass.

Each chunk's logits are made once and give loss and gradients together, so that the head costs three products in all, and
no more than `CHUNK_LOGITS` of `[tokens, vocab]` are there at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pshare_jax.model.layers import soft_cap
from pshare_jax.training.step.mesh import row_axes

CHUNK_LOGITS = 1 << 25
"""Most logits of a chunk (128 MiB in float32)."""


def chunk_tokens(num_tokens: int, vocab_size: int) -> int:
    """Tokens of a chunk: as many as their logits allow, cut so that little is padding."""
    most = max(1, CHUNK_LOGITS // vocab_size)
    num_chunks = -(-num_tokens // most)
    return -(-num_tokens // num_chunks)


def rows_nll(
    hidden: Float[Array, "B D size"],
    weight: Array,
    targets: Int[Array, "B D"],
    real: Float[Array, "B D"],
    *,
    mesh: Mesh | AbstractMesh,
    tied: bool,
    softcap: float | None,
    weight_grad: bool,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`head_nll` of all tokens. Where the mesh splits rows, every device walks over its own ones alone: left to the
    partitioner, all devices would gather all hidden states and walk over all chunks.
    """
    axes = row_axes(mesh)

    def own_rows(hidden: Array, weight: Array, targets: Array, real: Array) -> tuple[Array, Array]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        options = {"tied": tied, "softcap": softcap, "weight_grad": weight_grad}
        sums = head_nll(flat, weight, targets.reshape(-1), real.reshape(-1), **options)
        return jax.lax.psum(sums, axes) if axes else sums

    if not axes:
        return own_rows(hidden, weight, targets, real)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    split = jax.shard_map(
        own_rows,
        mesh=mesh,
        in_specs=(rows, whole, rows, rows),
        out_specs=whole,
        axis_names=set(axes),
        check_vma=False,
    )
    return split(hidden, weight, targets, real)


def head_nll(
    hidden: Float[Array, "N D"],
    weight: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, "N"],
    real: Float[Array, "N"],
    *,
    tied: bool,
    softcap: float | None,
    weight_grad: bool,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum over real tokens of -log softmax(logits)[target] in float32, and how many targets have the largest logit.

    `weight` is the head `[D, V]` or, `tied`, the embedding `[V, D]`; without `weight_grad` it gets no gradient.
    """
    chunk = chunk_tokens(hidden.shape[0], weight.shape[0 if tied else 1])
    missing = -hidden.shape[0] % chunk
    parts = [
        jnp.pad(one, [(0, missing), *[(0, 0)] * (one.ndim - 1)]).reshape(-1, chunk, *one.shape[1:])
        for one in (hidden, targets, real)
    ]
    return _nll(tied, softcap, weight_grad, parts[0], weight, parts[1], parts[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _nll(
    tied: bool, softcap: float | None, weight_grad: bool, hidden: Array, weight: Array, targets: Array, real: Array
) -> tuple[Array, Array]:
    def step(sums: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        x, target, one = chunk
        _, nll, correct, _ = _chunk(tied, softcap, x, weight, target, one)
        return (sums[0] + nll, sums[1] + correct), None

    return jax.lax.scan(step, (jnp.float32(0), jnp.float32(0)), (hidden, targets, real))[0]


def _forward(
    tied: bool, softcap: float | None, weight_grad: bool, hidden: Array, weight: Array, targets: Array, real: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array | None]]:
    def step(
        carry: tuple[Array, Array, Any], chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Any], Array]:
        x, target, one = chunk
        logits, nll, correct, shares = _chunk(tied, softcap, x, weight, target, one)
        hit = jnp.arange(logits.shape[1]) == target[:, None]
        slope = (shares - hit) * one[:, None]
        if softcap is not None:
            slope = slope * (1 - jnp.square(logits / softcap))
        slope = slope.astype(x.dtype)
        dx = jnp.einsum("NV,VD->ND" if tied else "NV,DV->ND", slope, weight)
        total, right, dw = carry
        if weight_grad:
            spec = "NV,ND->VD" if tied else "ND,NV->DV"
            factors = (slope, x) if tied else (x, slope)
            dw = dw + jnp.einsum(spec, *factors, preferred_element_type=jnp.float32)
        return (total + nll, right + correct, dw), dx

    dw = jnp.zeros(weight.shape, jnp.float32) if weight_grad else None
    (total, right, dw), dx = jax.lax.scan(step, (jnp.float32(0), jnp.float32(0), dw), (hidden, targets, real))
    return (total, right), (dx, None if dw is None else dw.astype(weight.dtype))


def _backward(
    tied: bool, softcap: float | None, weight_grad: bool, kept: tuple[Array, Array | None], slopes: tuple[Array, Array]
) -> tuple[Array, Array | None, None, None]:
    dx, dw = kept
    # The number of right answers has no gradient.
    scale = slopes[0]
    return (dx * scale).astype(dx.dtype), None if dw is None else (dw * scale).astype(dw.dtype), None, None


_nll.defvjp(_forward, _backward)


def _chunk(
    tied: bool, softcap: float | None, x: Array, weight: Array, target: Array, real: Array
) -> tuple[Array, Array, Array, Array]:
    """Logits, the sums of losses and of right answers, and softmax(logits)."""
    raw = jnp.einsum("ND,VD->NV" if tied else "ND,DV->NV", x, weight, preferred_element_type=jnp.float32)
    logits = soft_cap(raw, softcap)
    best = logits.max(-1, keepdims=True)
    powers = jnp.exp(logits - best)
    total = powers.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)
    nll = (jnp.log(total) + best - chosen)[:, 0]
    correct = (chosen == best)[:, 0]
    return logits, jnp.sum(nll * real), jnp.sum(correct * real), powers / total
