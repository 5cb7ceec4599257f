"""Cross-entropy of the LM head in chunks of tokens, so that the logits of all tokens never exist at once.

Each chunk's logits are computed once and give loss and gradients in the same pass: three matrix products in all, and at
most `CHUNK_LOGITS` logits in memory.
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
"""Maximum number of logits in a chunk (128 MiB in float32)."""


def chunk_tokens(num_tokens: int, vocab_size: int) -> int:
    """Tokens per chunk: at most `CHUNK_LOGITS` logits, in chunks of equal size so that padding is small."""
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
    """`head_nll` of all tokens. If the mesh splits rows, each device processes only its own rows: left to the
    partitioner, every device would gather all hidden states and process all chunks.
    """
    axes = row_axes(mesh)

    def local_rows(hidden: Array, weight: Array, targets: Array, real: Array) -> tuple[Array, Array]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        options = {"tied": tied, "softcap": softcap, "weight_grad": weight_grad}
        # Cast here, so that the sum of its gradients over devices, which is part of the backward pass, is in float32.
        sums = head_nll(flat, weight.astype(hidden.dtype), targets.reshape(-1), real.reshape(-1), **options)
        return jax.lax.psum(sums, axes) if axes else sums

    if not axes:
        return local_rows(hidden, weight, targets, real)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    split = jax.shard_map(
        local_rows,
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
    """The float32 sum of -log softmax(logits)[target] over tokens with real = 1, and the number of argmax hits.

    `weight` is the head `[D, V]` or, if `tied`, the embedding `[V, D]`; without `weight_grad` it gets no gradient.
    """
    chunk = chunk_tokens(hidden.shape[0], weight.shape[0 if tied else 1])
    missing = -hidden.shape[0] % chunk
    parts = [
        jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, chunk, *x.shape[1:])
        for x in (hidden, targets, real)
    ]
    return _nll(tied, softcap, weight_grad, parts[0], weight, parts[1], parts[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _nll(
    tied: bool, softcap: float | None, weight_grad: bool, hidden: Array, weight: Array, targets: Array, real: Array
) -> tuple[Array, Array]:
    def step(sums: tuple[Array, Array], chunk: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        x, target, mask = chunk
        _, nll, correct, _ = _chunk(tied, softcap, x, weight, target, mask)
        return (sums[0] + nll, sums[1] + correct), None

    return jax.lax.scan(step, (jnp.float32(0), jnp.float32(0)), (hidden, targets, real))[0]


def _forward(
    tied: bool, softcap: float | None, weight_grad: bool, hidden: Array, weight: Array, targets: Array, real: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array | None]]:
    def step(
        carry: tuple[Array, Array, Any], chunk: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Any], Array]:
        x, target, mask = chunk
        logits, nll, correct, probs = _chunk(tied, softcap, x, weight, target, mask)
        one_hot = jnp.arange(logits.shape[1]) == target[:, None]
        grad = (probs - one_hot) * mask[:, None]
        if softcap is not None:
            grad = grad * (1 - jnp.square(logits / softcap))
        grad = grad.astype(x.dtype)
        dx = jnp.einsum("NV,VD->ND" if tied else "NV,DV->ND", grad, weight)
        total, hits, dw = carry
        if weight_grad:
            spec = "NV,ND->VD" if tied else "ND,NV->DV"
            factors = (grad, x) if tied else (x, grad)
            dw = dw + jnp.einsum(spec, *factors, preferred_element_type=jnp.float32)
        return (total + nll, hits + correct, dw), dx

    dw = jnp.zeros(weight.shape, jnp.float32) if weight_grad else None
    (total, hits, dw), dx = jax.lax.scan(step, (jnp.float32(0), jnp.float32(0), dw), (hidden, targets, real))
    return (total, hits), (dx, None if dw is None else dw.astype(weight.dtype))


def _backward(
    tied: bool, softcap: float | None, weight_grad: bool, saved: tuple[Array, Array | None], grads: tuple[Array, Array]
) -> tuple[Array, Array | None, None, None]:
    dx, dw = saved
    # The number of correct predictions has no gradient.
    scale = grads[0]
    return (dx * scale).astype(dx.dtype), None if dw is None else (dw * scale).astype(dw.dtype), None, None


_nll.defvjp(_forward, _backward)


def _chunk(
    tied: bool, softcap: float | None, x: Array, weight: Array, target: Array, real: Array
) -> tuple[Array, Array, Array, Array]:
    """Logits, summed loss, number of correct predictions, and softmax(logits)."""
    raw = jnp.einsum("ND,VD->NV" if tied else "ND,DV->NV", x, weight, preferred_element_type=jnp.float32)
    logits = soft_cap(raw, softcap)
    best = logits.max(-1, keepdims=True)
    powers = jnp.exp(logits - best)
    total = powers.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)
    nll = (jnp.log(total) + best - chosen)[:, 0]
    correct = (chosen == best)[:, 0]
    return logits, jnp.sum(nll * real), jnp.sum(correct * real), powers / total
