"""Dense KV of one batch of sequences, for the plain loop: prefill computes it, transfer copies it, decode extends it.

Each layer has a pair (keys, values) of `[B, kv_heads, capacity, head_dim]`; slot s holds the token at absolute position
s. Capacities are bucketed so that few shapes are compiled.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LayerKV = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]


@dataclass(frozen=True)
class DenseKV:
    """Keys and values of `length` tokens in each row, in arrays of `capacity` slots; later slots are undefined."""

    layers: tuple[LayerKV, ...]
    length: int

    @property
    def capacity(self) -> int:
        """Slots in each array."""
        return self.layers[0][0].shape[2]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.layers[0][0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the `length` tokens' keys and values in all layers; replicas on a mesh count once."""
        return sum(k.nbytes + v.nbytes for k, v in self.layers) * self.length // self.capacity

    def grown(self, capacity: int) -> "DenseKV":
        """The same KV with room for at least `capacity` tokens."""
        if capacity <= self.capacity:
            return self
        return replace(self, layers=_pad(self.layers, bucket(capacity) - self.capacity))

    def copy(self, capacity: int = 0) -> "DenseKV":
        """The same KV in new arrays, with room for at least `capacity` tokens."""
        extra = max(0, bucket(max(capacity, self.length)) - self.capacity)
        return replace(self, layers=_pad(self.layers, extra))


def bucket(size: int, smallest: int = 16) -> int:
    """The smallest of 16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, ... that is at least `size`.

    Powers of two, and above 256 also the midpoints: few shapes to compile, long arrays are at most a third empty.
    """
    power = max(smallest, 1 << max(0, size - 1).bit_length())
    half_way = power // 4 * 3
    return half_way if half_way > 256 and size <= half_way else power


def write(
    layer: LayerKV,
    start: Int[Array, ""],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    after: Array | None,
) -> LayerKV:
    """Write T tokens' keys and values at slots `start`, ...; the caller provides room (XLA would shift the write).

    A donated cache must not be written before `after`, a result computed from the old cache. XLA drops optimization
    barriers before it orders operations, so the new values depend on a comparison with `after` that is always false.
    """
    keys, values = layer
    at = (0, 0, start, 0)
    if after is not None:
        nothing = (after[(0,) * after.ndim] > jnp.inf).astype(k.dtype)
        k, v = k + nothing, v + nothing
    return jax.lax.dynamic_update_slice(keys, k, at), jax.lax.dynamic_update_slice(values, v, at)


@jax.jit(static_argnums=1)
def _pad(layers: tuple, extra: int) -> tuple:
    # Always a copy: the result may be donated, and the argument must stay usable.
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) if extra else jnp.copy(x), layers)
