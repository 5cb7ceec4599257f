"""KV in pages: the device arrays that a serving worker's pool owns, and how tokens are written into them and moved out.

Per layer a pair (keys, values) of `[kv_heads, pages, page_size, head_dim]`, heads first: the faster order on CPU and the one
that JAX's GPU paged-attention kernel takes. A slot is page * page_size + offset; page 0 takes the padding and is never read.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pshare_jax.mesh import pages_sharding
from pshare_jax.model.config import ModelConfig

LayerPages = tuple[Float[Array, "K P page H"], Float[Array, "K P page H"]]
KVPages = tuple[LayerPages, ...]
PageContent = tuple[tuple[Float[Array, "K n page H"], Float[Array, "K n page H"]], ...]


def empty_pages(config: ModelConfig, num_pages: int, page_size: int, dtype: str, mesh: Mesh) -> KVPages:
    """A pool of zeros on `mesh`, page 0 included."""
    shape = (config.num_kv_heads, num_pages, page_size, config.head_dim)
    sharding = pages_sharding(config, mesh)
    return tuple(
        (jnp.zeros(shape, dtype, device=sharding), jnp.zeros(shape, dtype, device=sharding)) for _ in config.layers
    )


def slots_of(page_table: Int[Array, "B M"], positions: Int[Array, "B T"], page_size: int) -> Int[Array, "B T"]:
    """Where the tokens at `positions` of each row live."""
    return jnp.take_along_axis(page_table, positions // page_size, axis=1) * page_size + positions % page_size


def write_slots(
    layer: LayerPages,
    slots: Int[Array, "B T"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    after: Array,
) -> LayerPages:
    """Put tokens' keys and values into their slots; several may share page 0, whose content is never read.

    `after` is computed from the old pages; the write depends on it so that donated pages are written in place (see
    `kv.write`).
    """
    nothing = (after[(0,) * after.ndim] > jnp.inf).astype(k.dtype)
    flat = slots.reshape(-1)

    def put(pages: Array, new: Array) -> Array:
        K, P, page, H = pages.shape
        heads_first = new.transpose(2, 0, 1, 3).reshape(K, -1, H) + nothing
        return pages.reshape(K, P * page, H).at[:, flat].set(heads_first).reshape(pages.shape)

    return put(layer[0], k), put(layer[1], v)


@jax.jit
def gather_pages(pool: KVPages, ids: Int[Array, "n"]) -> PageContent:
    """The content of the pages `ids` of every layer, for a transfer; padding ids are 0."""
    return jax.tree.map(lambda pages: pages[:, ids], pool)


@jax.jit(donate_argnums=0)
def scatter_pages(pool: KVPages, ids: Int[Array, "n"], content: PageContent) -> KVPages:
    """Put transferred pages into the pool in place; `content` comes from `gather_pages`, padding goes to page 0."""
    return jax.tree.map(lambda pages, new: pages.at[:, ids].set(new), pool, content)
