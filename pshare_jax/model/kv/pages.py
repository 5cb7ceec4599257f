"""Paged KV: the device arrays of a worker's pool, and the functions that write, gather, scatter and transfer pages.

Each layer has a pair (keys, values) of `[kv_heads, pages, page_size, head_dim]`: the faster order on CPU, and the order
of JAX's GPU paged-attention kernel. A slot is page * page_size + offset; page 0 receives padding and is never read.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from pshare_jax.model.config import ModelConfig
from pshare_jax.model.sharding import content_sharding, pages_sharding

LayerPages = tuple[Float[Array, "K P page H"], Float[Array, "K P page H"]]
KVPages = tuple[LayerPages, ...]
PageContent = Float[Array, "L 2 K n page H"]
"""The keys and values of n pages of all layers in one array, for transfers between pools."""
HostContent = Float[np.ndarray, "L 2 K n page H"]
"""`PageContent` in host memory."""


def empty_pages(config: ModelConfig, num_pages: int, page_size: int, dtype: str, mesh: Mesh) -> KVPages:
    """A pool of zeros on `mesh`, page 0 included."""
    shape = (config.num_kv_heads, num_pages, page_size, config.head_dim)
    sharding = pages_sharding(config, mesh)
    return tuple(
        (jnp.zeros(shape, dtype, device=sharding), jnp.zeros(shape, dtype, device=sharding)) for _ in config.layers
    )


def page_bytes(config: ModelConfig, page_size: int, dtype: str) -> int:
    """Bytes of one page of all layers; replicas on a mesh count once."""
    return page_size * 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(dtype).itemsize


def slots_of(page_table: Int[Array, "B M"], positions: Int[Array, "B T"], page_size: int) -> Int[Array, "B T"]:
    """The slots of the tokens at `positions` of each row."""
    pages = jnp.take_along_axis(page_table, positions // page_size, axis=1)
    return slots_in(pages, positions, page_size)


def slots_in(pages: Int[Array, "*S"], positions: Int[Array, "*S"], page_size: int) -> Int[Array, "*S"]:
    """The slots of the tokens at `positions`, each in its page."""
    return pages * page_size + positions % page_size


def by_slot(part: Float[Array, "K P page H"]) -> Float[Array, "K S H"]:
    """A pool's keys or values by slot."""
    return part.reshape(part.shape[0], -1, part.shape[3])


def write_slots(
    layer: LayerPages,
    slots: Int[Array, "B T"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    after: Array,
) -> LayerPages:
    """Write tokens' keys and values into their slots. `after` is computed from the old pages (see `dense.write`)."""
    nothing = (after[(0,) * after.ndim] > jnp.inf).astype(k.dtype)
    flat = slots.reshape(-1)

    def written(pages: Array, new: Array) -> Array:
        K, H = pages.shape[0], pages.shape[3]
        heads_first = new.transpose(2, 0, 1, 3).reshape(K, -1, H) + nothing
        return by_slot(pages).at[:, flat].set(heads_first).reshape(pages.shape)

    return written(layer[0], k), written(layer[1], v)


def gather_pages(pages: KVPages, ids: Int[Array, "n"]) -> PageContent:
    """The content of the pages `ids` in all layers; padding ids are 0."""
    return jnp.stack([jnp.stack([part[:, ids] for part in layer]) for layer in pages])


def scatter_pages(pages: KVPages, ids: Int[Array, "n"], content: PageContent) -> KVPages:
    """Write content into the pages `ids`; padding ids are 0."""
    return tuple(
        (keys.at[:, ids].set(new[0]), values.at[:, ids].set(new[1]))
        for (keys, values), new in zip(pages, content, strict=True)
    )


def fill_pages(pages: KVPages, ids: Int[Array, "n"], value: Float[Array, ""]) -> KVPages:
    """Overwrite the pages `ids` with one value (debug mode: NaN in freed pages)."""
    return jax.tree.map(lambda part: part.at[:, ids].set(value.astype(part.dtype)), pages)


def device_put_content(content: PageContent | HostContent, config: ModelConfig, mesh: Mesh) -> PageContent:
    """A copy of the content on the pool's mesh in the pool's sharding, made by one `jax.device_put`."""
    return jax.device_put(content, content_sharding(config, mesh), may_alias=False)


def content_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
    """The shape of the content of `num_pages` pages."""
    return (config.num_layers, 2, config.num_kv_heads, num_pages, page_size, config.head_dim)


def pages_out(config: ModelConfig, mesh: Mesh) -> tuple[tuple[NamedSharding, NamedSharding], ...]:
    """The shardings of a pool's arrays, for `jax.jit(out_shardings=...)`."""
    sharding = pages_sharding(config, mesh)
    return tuple((sharding, sharding) for _ in config.layers)
