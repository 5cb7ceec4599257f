"""Random rows for paged attention, and the cases that all its forms are tested on."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.model.paged_batch import PagedBatch, shared_prefixes

ROWS, TABLE_TOKENS = 5, 150


class Case(NamedTuple):
    """A layer and the number of new tokens of each row."""

    page_size: int
    num_new: int
    q_heads: int
    kv_heads: int
    window: int | None = None
    softcap: float | None = None
    dtype: str = "float32"
    head_dim: int = 8


CASES = {
    "gqa": Case(4, 1, 6, 2),
    "window": Case(16, 1, 4, 4, 40, 5.0),
    "mqa": Case(3, 1, 4, 1, 7),
    "chunk": Case(5, 40, 4, 2),
    "window chunk": Case(16, 40, 2, 1, 50, 5.0),
    "short chunk": Case(4, 6, 4, 2, 33),
    "bfloat16": Case(4, 1, 4, 2, dtype="bfloat16"),
}


@functools.cache
def _compiled(case: Case, attention_fn: Any) -> Any:
    scale = case.head_dim**-0.5
    return jax.jit(lambda *arrays, independent: attention_fn(*arrays, case.window, scale, case.softcap, independent))


class World:
    """Random rows, some of which begin with the pages of another; what no row has stored is NaN."""

    def __init__(self, case: Case, lengths: Any, parents: Any, prefixes: Any, seed: int):
        page, self.T, N, K, self.window, _, dtype, H = case
        self.case, self.page, draw = case, page, np.random.default_rng(seed)
        width, shape = -(-TABLE_TOKENS // page), (K, ROWS * -(-TABLE_TOKENS // page) + 1, page, H)
        table = draw.permutation(np.arange(1, shape[1])).reshape(ROWS, width).astype(np.int32)
        lengths = np.array(lengths, np.int32)
        for row in range(1, ROWS):
            common = min(prefixes[row], lengths[row] // page, lengths[parents[row] % row] // page)
            table[row, :common] = table[parents[row] % row, :common]
        parts = [np.full(shape, np.nan, np.float32) for _ in range(2)]
        for part in parts:
            for row in range(ROWS):
                stored = lengths[row] + (self.T if self.T > 1 else 0)
                for at in range(stored):
                    part[:, table[row, at // page], at % page] = draw.normal(size=(K, H))
        self.pages = tuple(jnp.asarray(part, dtype) for part in parts)
        news = [draw.normal(size=(ROWS, self.T, heads, H)) for heads in (N, K, K)]
        self.news = tuple(jnp.asarray(part, dtype) for part in news)
        counts = np.where(lengths > 0, self.T, 0).astype(np.int32)
        self.batch = PagedBatch(table, lengths, counts, np.zeros(ROWS, np.int32))
        if self.T == 1:
            self.batch = self.batch._replace(shared=shared_prefixes(table, lengths, page))

    def run(self, attention_fn: Any, independent: bool = False) -> np.ndarray:
        """The result in float32; only rows of several new tokens can be independent."""
        flag = np.array(independent) if self.T > 1 else None
        out = _compiled(self.case, attention_fn)(*self.news, self.pages, self.batch, independent=flag)
        return np.asarray(out.astype(jnp.float32))
