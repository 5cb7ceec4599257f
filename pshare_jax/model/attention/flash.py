"""Attention with gradients, block by block (FlashAttention-2, arXiv 2307.08691): scores exist for one pair of blocks at a time.

A program has one copy of the loops' bodies, whatever the lengths. Blocks of keys that no query of a block sees are skipped at run
time, so that packed rows cost what their samples cost. Training uses it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.mesh import by_rows
from pshare_jax.model.layers import soft_cap

QUERY_BLOCK, KEY_BLOCK = 128, 256
"""Maximum numbers of queries and of keys in a block."""
_NONE = jnp.iinfo(jnp.int32).max


class Queries(NamedTuple):
    """What queries see: keys of their group (0: of none), of an order up to their limit, in the window up to their position."""

    groups: Int[Array, "B T"]
    limits: Int[Array, "B T"]
    positions: Int[Array, "B T"]


class Keys(NamedTuple):
    """The groups of keys (0: padding), their orders in the group, and their positions."""

    groups: Int[Array, "B S"]
    orders: Int[Array, "B S"]
    positions: Int[Array, "B S"]


class KeySet(NamedTuple):
    """Keys and values, and which of them each query sees."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    keys: Keys
    queries: Queries


class Scoring(NamedTuple):
    """How scores are made: their factor and cap, and the number of keys up to its own position that a query sees (None: all)."""

    scale: float
    softcap: float | None
    window: int | None


def flash_attention(
    q: Float[Array, "B T N H"],
    constant: tuple[KeySet, ...],
    trained: tuple[KeySet, ...],
    scoring: Scoring,
    mesh: Mesh | AbstractMesh,
    row_axes: tuple[str, ...],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention in one float32 softmax over the visible keys of all sets; 0 for a query that sees none.

    No gradient reaches the keys and values of the `constant` sets. Each device of the mesh's `row_axes` has loops of its own.
    """
    rows = PartitionSpec(row_axes)
    run = by_rows(functools.partial(_flash, scoring), mesh, row_axes, rows, rows)
    return run(q, constant, trained)


def _flash(scoring: Scoring, q: Array, constant: tuple[KeySet, ...], trained: tuple[KeySet, ...]) -> Array:
    sets = tuple(map(_padded, (*constant, *trained)))
    T, num_trained = q.shape[1], len(trained)
    size = _block_size(T, QUERY_BLOCK)
    pairs = tuple((x.k, x.v) for x in sets)
    seen = tuple(_Sight(_in_blocks(x.queries, size), x.keys) for x in sets)
    spans = tuple(_spans(sight, scoring.window) for sight in seen)
    blocks = _queries_first(q, size, sets[0].k.shape[1])
    out: Array = _attend(scoring, num_trained, blocks, pairs, seen, spans)
    nq, B, K, GQ, H = out.shape
    heads = out.reshape(nq, B, K, GQ // size, size, H).transpose(1, 0, 4, 2, 3, 5)
    return heads.reshape(B, nq * size, -1, H)[:, :T]


# --- blocks ----------------------------------------------------------------------------------------------------------


class _Sight(NamedTuple):
    """Queries in blocks, `[blocks, B, Q]`, or those of one block, `[B, Q]`; and the keys of a set, padded to whole blocks."""

    queries: Queries
    keys: Keys


def _block_size(length: int, most: int) -> int:
    """The size of equal blocks, so that padding is small."""
    return -(-length // -(-length // most))


def _padded(keys: KeySet) -> KeySet:
    """The set with its keys padded to whole blocks."""
    missing = -keys.k.shape[2] % _block_size(keys.k.shape[2], KEY_BLOCK)
    wide = ((0, 0), (0, 0), (0, missing), (0, 0))
    marks = Keys(*(jnp.pad(x, ((0, 0), (0, missing))) for x in keys.keys))
    return keys._replace(k=jnp.pad(keys.k, wide), v=jnp.pad(keys.v, wide), keys=marks)


def _in_blocks(queries: Queries, size: int) -> Queries:
    def split(marks: Array) -> Array:
        marks = jnp.pad(marks, ((0, 0), (0, -marks.shape[1] % size)))
        return marks.reshape(len(marks), -1, size).swapaxes(0, 1)

    return Queries(*map(split, queries))


def _queries_first(q: Array, size: int, num_kv_heads: int) -> Float[Array, "blocks B K GQ H"]:
    """Queries in blocks, those of a block's query heads of a kv head as rows of one matrix."""
    B, T, N, H = q.shape
    q = jnp.pad(q, ((0, 0), (0, -T % size), (0, 0), (0, 0)))
    q = q.reshape(B, -1, size, num_kv_heads, N // num_kv_heads, H).transpose(1, 0, 3, 4, 2, 5)
    return q.reshape(*q.shape[:3], -1, H)


def _spans(sight: _Sight, window: int | None) -> Int[Array, "blocks 2"]:
    """For each block of queries, the first block of keys that it may see, and the one after the last."""
    size = _block_size(sight.keys.groups.shape[1], KEY_BLOCK)
    keys = Keys(*(x.reshape(len(x), -1, size).swapaxes(0, 1) for x in sight.keys))
    queries = sight.queries
    key_real, query_real = keys.groups > 0, queries.groups > 0

    def least(x: Array, real: Array) -> Array:
        return jnp.where(real, x, _NONE).min(-1)

    def most(x: Array, real: Array) -> Array:
        return jnp.where(real, x, -1).max(-1)

    def pairs(of_queries: Array, of_keys: Array) -> tuple[Array, Array]:
        return of_queries[:, None], of_keys[None]

    lowest, highest = pairs(least(queries.groups, query_real), most(keys.groups, key_real))
    may = lowest <= highest
    highest, lowest = pairs(most(queries.groups, query_real), least(keys.groups, key_real))
    may &= lowest <= highest
    limit, first = pairs(most(queries.limits, query_real), least(keys.orders, key_real))
    may &= first <= limit
    if window is not None:
        nearest, last = pairs(least(queries.positions, query_real), most(keys.positions, key_real))
        may &= nearest - last < window
    may = may.any(-1)
    start, stop = may.argmax(1), may.shape[1] - may[:, ::-1].argmax(1)
    return jnp.stack([start, jnp.where(may.any(1), stop, start)], axis=1).astype(jnp.int32)


# --- the two passes --------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """A block of keys with its part of the queries' sight."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    start: Int[Array, ""]
    visible: Bool[Array, "B 1 1 Q S"]


def _block(pair: tuple[Array, Array], sight: _Sight, window: int | None, index: Array) -> _Block:
    """The key block `index`; the queries of `sight` are those of one block."""
    size = _block_size(pair[0].shape[2], KEY_BLOCK)
    start = index * size
    k, v = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in pair)
    keys = Keys(*(jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)[:, None] for x in sight.keys))
    groups, limits, positions = (x[:, :, None] for x in sight.queries)
    visible = (keys.groups == groups) & (groups > 0) & (keys.orders <= limits)
    if window is not None:
        visible &= positions - keys.positions < window
    return _Block(k, v, start, visible[:, None, None])


def _scores(scoring: Scoring, q: Array, block: _Block) -> tuple[Array, Array]:
    """The capped scores `[B, K, GQ, S]`, -inf where not visible, and their slope by the uncapped ones."""
    raw = jnp.einsum("BKQH,BKSH->BKQS", q, block.k, preferred_element_type=jnp.float32) * scoring.scale
    capped = soft_cap(raw, scoring.softcap)
    slope = jnp.float32(1) if scoring.softcap is None else 1 - jnp.square(capped / scoring.softcap)
    by_query = capped.reshape(*capped.shape[:2], -1, *block.visible.shape[-2:])
    return jnp.where(block.visible, by_query, -jnp.inf).reshape(capped.shape), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scoring: Scoring, num_trained: int, q: Array, pairs: tuple, seen: tuple, spans: tuple) -> Array:
    return _forward(scoring, num_trained, q, pairs, seen, spans)[0]


def _forward(
    scoring: Scoring, num_trained: int, q: Array, pairs: tuple, seen: tuple, spans: tuple
) -> tuple[Array, tuple]:
    def one_block(_: None, xs: tuple) -> tuple[None, tuple[Array, Array]]:
        q, queries, spans = xs
        rows = q.shape[:-1]
        state = jnp.full(rows, jnp.finfo(jnp.float32).min), jnp.zeros(rows), jnp.zeros(q.shape, jnp.float32)
        for pair, block_queries, sight, span in zip(pairs, queries, seen, spans, strict=True):
            own = _Sight(block_queries, sight.keys)

            def add(index: Array, state: tuple, pair: tuple = pair, own: _Sight = own) -> tuple:
                highest, total, out = state
                block = _block(pair, own, scoring.window, index)
                scores, _ = _scores(scoring, q, block)
                new = jnp.maximum(highest, scores.max(-1))
                weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
                product = _product("BKQS,BKSH->BKQH", weights.astype(q.dtype), block.v)
                return new, total * shrink + weights.sum(-1), out * shrink[..., None] + product

            state = jax.lax.fori_loop(span[0], span[1], add, state)
        highest, total, out = state
        # A query that sees no key has no weights; with this sum its weights in the second pass are 0, too.
        some = total > 0
        log_sum = jnp.where(some, highest + jnp.log(jnp.where(some, total, 1)), jnp.inf)
        return None, ((out / jnp.where(some, total, 1)[..., None]).astype(q.dtype), log_sum)

    queries = tuple(sight.queries for sight in seen)
    _, (out, log_sum) = jax.lax.scan(one_block, None, (q, queries, spans))
    return out, (q, pairs, seen, spans, out, log_sum)


def _backward(scoring: Scoring, num_trained: int, saved: tuple, d_out: Array) -> tuple:
    q, pairs, seen, spans, out, log_sum = saved
    first_trained = len(pairs) - num_trained

    def one_block(slopes: tuple, xs: tuple) -> tuple[tuple, Array]:
        q, queries, spans, out, log_sum, d_out = xs
        delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
        d_q, after = jnp.zeros(q.shape, jnp.float32), []
        for number, (pair, block_queries, sight, span) in enumerate(zip(pairs, queries, seen, spans, strict=True)):
            own = _Sight(block_queries, sight.keys)

            def add(index: Array, state: tuple, pair: tuple = pair, own: _Sight = own) -> tuple:
                d_q, slopes = state
                block = _block(pair, own, scoring.window, index)
                scores, slope = _scores(scoring, q, block)
                weights = jnp.exp(scores - log_sum[..., None])
                d_weights = _product("BKQH,BKSH->BKQS", d_out, block.v)
                d_scores = (weights * (d_weights - delta[..., None]) * slope * scoring.scale).astype(q.dtype)
                d_q = d_q + _product("BKQS,BKSH->BKQH", d_scores, block.k)
                if slopes is not None:
                    d_k = _product("BKQS,BKQH->BKSH", d_scores, q)
                    d_v = _product("BKQS,BKQH->BKSH", weights.astype(q.dtype), d_out)
                    slopes = _added(slopes[0], d_k, block.start), _added(slopes[1], d_v, block.start)
                return d_q, slopes

            before = slopes[number - first_trained] if number >= first_trained else None
            d_q, added = jax.lax.fori_loop(span[0], span[1], add, (d_q, before))
            if added is not None:
                after.append(added)
        return tuple(after), d_q.astype(q.dtype)

    queries = tuple(sight.queries for sight in seen)
    zeros = tuple((jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)) for k, v in pairs[first_trained:])
    slopes, d_q = jax.lax.scan(one_block, zeros, (q, queries, spans, out, log_sum, d_out))
    cast = [(d_k.astype(q.dtype), d_v.astype(q.dtype)) for d_k, d_v in slopes]
    return d_q, (*[(None, None)] * first_trained, *cast), None, None


_attend.defvjp(_forward, _backward)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _added(total: Array, part: Array, start: Array) -> Array:
    """`total` with `part` added at the keys from `start` on."""
    before = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(total, before + part, start, axis=2)
