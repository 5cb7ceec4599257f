"""The LM head in chunks of tokens, so that the logits of all tokens never exist at once. The objectives call it.

`sums_over_tokens` is for losses that are sums over tokens: each chunk's logits are computed once and give value and gradients
in the same pass, three matrix products in all. `each_token` computes values token by token. On a mesh that splits rows, each
device processes only its own: left to the partitioner, every device would gather all hidden states and process all chunks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from pshare_jax.mesh import by_rows
from pshare_jax.model.layers import soft_cap
from pshare_jax.training.step.mesh import row_axes

CHUNK_LOGITS = 1 << 25
"""Maximum number of logits in a chunk (128 MiB in float32)."""

TokenLoss = Callable[[Array, Any, Any], tuple[tuple[Array, ...], Array]]
"""(logits `[n, V]`, arrays of the n tokens, a constant) -> sums over the tokens, and the first sum's gradient `[n, V]`.

It must be hashable, and is called on chunks whose last tokens may be zeros.
"""


class Head(NamedTuple):
    """The matrix of the logits, `[D, V]` or, if `tied`, the embedding `[V, D]`; it gets a gradient only if `trained`."""

    weight: Any
    mesh: Mesh | AbstractMesh
    tied: bool
    softcap: float | None
    trained: bool


def chunk_tokens(num_tokens: int, vocab_size: int) -> int:
    """Tokens per chunk: at most `CHUNK_LOGITS` logits, in chunks of equal size so that padding is small."""
    most = max(1, CHUNK_LOGITS // vocab_size)
    num_chunks = -(-num_tokens // most)
    return -(-num_tokens // num_chunks)


def logits_of(
    x: Float[Array, "N D"], weight: Float[Array, "D V"] | Float[Array, "V D"], tied: bool, softcap: float | None
) -> Float[Array, "N V"]:
    """The logits of a chunk, in float32."""
    raw = jnp.einsum("ND,VD->NV" if tied else "ND,DV->NV", x, weight, preferred_element_type=jnp.float32)
    return soft_cap(raw, softcap)


def sums_over_tokens(
    loss: TokenLoss, head: Head, hidden: Float[Array, "B D size"], inputs: Any, constant: Any = None
) -> tuple[Float[Array, ""], ...]:
    """The sums of `loss` over all tokens, of which the first has gradients to `hidden` and, if trained, the head's weight.

    `inputs` are arrays `[B, D, ...]`.
    """

    def local_rows(hidden: Array, weight: Array, inputs: Any, constant: Any) -> tuple[Array, ...]:
        # Cast here, so that the sum of its gradients over devices, which is part of the backward pass, is in float32.
        summing = _Summing(loss, head.tied, head.softcap, head.trained)
        flat = jax.tree.map(_flat, (hidden, inputs))
        sums: Any = _sums(summing, *_chunks(flat, head, weight), weight.astype(hidden.dtype), constant)
        return jax.lax.psum(sums, axes) if axes else sums

    axes = row_axes(head.mesh)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    split = by_rows(local_rows, head.mesh, axes, (rows, whole, rows, whole), whole)
    return split(hidden, head.weight, inputs, constant)


def each_token(
    values: Callable[[Array, Any], Any], head: Head, hidden: Float[Array, "B D size"], inputs: Any = ()
) -> Any:
    """`values(logits, inputs)` of every token, in arrays `[B, D, ...]`; no gradient is meant to pass."""

    def local_rows(hidden: Array, weight: Array, inputs: Any) -> Any:
        flat, weight = jax.tree.map(_flat, (hidden, inputs)), weight.astype(hidden.dtype)

        def chunk(parts: tuple[Array, Any]) -> Any:
            return values(logits_of(parts[0], weight, head.tied, head.softcap), parts[1])

        found = jax.lax.map(chunk, _chunks(flat, head, weight))
        count, shape = flat[0].shape[0], hidden.shape[:2]
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*shape, *x.shape[2:]), found)

    axes = row_axes(head.mesh)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    split = by_rows(local_rows, head.mesh, axes, (rows, whole, rows), rows)
    return split(hidden, head.weight, inputs)


# --- a device's rows -------------------------------------------------------------------------------------------------


def _flat(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _chunks(flat: Any, head: Head, weight: Array) -> Any:
    """Arrays of all tokens, padded with zeros, as `[chunks, tokens of a chunk, ...]`."""
    num_tokens = jax.tree.leaves(flat)[0].shape[0]
    chunk = chunk_tokens(num_tokens, weight.shape[0 if head.tied else 1])
    missing = -num_tokens % chunk

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, chunk, *x.shape[1:])

    return jax.tree.map(padded, flat)


# --- value and gradients in one pass ---------------------------------------------------------------------------------


class _Summing(NamedTuple):
    """What is known when the program is compiled: the loss, and of the head all but its weight."""

    loss: TokenLoss
    tied: bool
    softcap: float | None
    weight_grad: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(how: _Summing, hidden: Array, inputs: Any, weight: Array, constant: Any) -> tuple[Array, ...]:
    def found(x: Array, given: Any) -> tuple[Array, ...]:
        return how.loss(logits_of(x, weight, how.tied, how.softcap), given, constant)[0]

    def step(sums: tuple[Array, ...], chunk: tuple[Array, Any]) -> tuple[tuple[Array, ...], None]:
        return jax.tree.map(jnp.add, sums, found(*chunk)), None

    return jax.lax.scan(step, _zeros(found, hidden, inputs), (hidden, inputs))[0]


def _forward(
    how: _Summing, hidden: Array, inputs: Any, weight: Array, constant: Any
) -> tuple[tuple[Array, ...], tuple[Array, Array | None]]:
    loss, tied, softcap, weight_grad = how

    def found(x: Array, given: Any) -> tuple[Array, tuple[Array, ...], Array]:
        logits = logits_of(x, weight, tied, softcap)
        return logits, *loss(logits, given, constant)

    def step(carry: tuple[Any, Any], chunk: tuple[Array, Any]) -> tuple[tuple[Any, Any], Array]:
        x, given = chunk
        logits, new, grad = found(x, given)
        if softcap is not None:
            grad = grad * (1 - jnp.square(logits / softcap))
        grad = grad.astype(x.dtype)
        dx = jnp.einsum("NV,VD->ND" if tied else "NV,DV->ND", grad, weight)
        sums, dw = carry
        if weight_grad:
            spec = "NV,ND->VD" if tied else "ND,NV->DV"
            factors = (grad, x) if tied else (x, grad)
            dw = dw + jnp.einsum(spec, *factors, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, new), dw), dx

    dw = jnp.zeros(weight.shape, jnp.float32) if weight_grad else None
    zeros = _zeros(lambda *chunk: found(*chunk)[1], hidden, inputs)
    (sums, dw), dx = jax.lax.scan(step, (zeros, dw), (hidden, inputs))
    return sums, (dx, None if dw is None else dw.astype(weight.dtype))


def _backward(
    how: _Summing, saved: tuple[Array, Array | None], grads: tuple[Array, ...]
) -> tuple[Array, None, Array | None, None]:
    dx, dw = saved
    # Only the first sum is a loss.
    scale = grads[0]
    return (dx * scale).astype(dx.dtype), None, None if dw is None else (dw * scale).astype(dw.dtype), None


_sums.defvjp(_forward, _backward)


def _zeros(found: Callable[..., tuple[Array, ...]], hidden: Array, inputs: Any) -> tuple[Array, ...]:
    first = jax.tree.map(lambda x: x[0], (hidden, inputs))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(found, *first))
