"""Every form of paged attention against the plain XLA form in float32: the largest difference, and the time of each."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.device.check import Cell, Check
from benchmarks.device.sizes import PAGE
from benchmarks.device.timing import median_seconds
from pshare_jax.engine.config import GPUS
from pshare_jax.model.attention.blocked import blocked
from pshare_jax.model.attention.paged import PagedAttention, gathered
from pshare_jax.model.paged_batch import PagedBatch, SharedPrefixes, shared_prefixes
from pshare_jax.model.paged_steps import attention_of

TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-5}
"""The largest difference that is allowed, of outputs above 1 as a part of them."""


@dataclass(frozen=True)
class Case:
    """The rows' contexts and new tokens, heads, and what a layer adds: a window, a soft cap, a common prefix."""

    name: str
    contexts: tuple[int, ...]
    tokens: int = 1
    heads: tuple[int, int, int] = (32, 8, 128)
    window: int | None = None
    softcap: float | None = None
    common: int = 0


CASES = (
    Case("decode, 1 row at 8191, 2 of padding, 5 short", (8191, 0, 1, 15, 16, 17, 100, 0), heads=(16, 8, 128)),
    Case("chunk of 160 at 1000, heads of 256, window 512", (1000,), 160, (8, 4, 256), 512),
    Case("decode, 8 rows at 4096, heads of 128", (4096,) * 8),
    Case("decode, 16 rows at 2048, heads of 64", (2048,) * 16, heads=(32, 8, 64)),
    Case("decode, heads of 256, window 512, cap 50", (1537, 511, 2048), heads=(8, 4, 256), window=512, softcap=50.0),
    Case("decode, 8 rows on a common prefix of 2048", (2048 + 96,) * 8, common=2048),
    Case("chunk of 512 at 3583", (3583,), 512),
    Case("chunk of 512 at 0, heads of 64", (0,), 512, (32, 8, 64)),
    Case("chunks of 64 of 4 rows", (0, 100, 1000, 777), 64),
)


def forms(mesh: Mesh) -> dict[str, PagedAttention]:
    """The forms that the platform has, by name. In float32, `gathered` is also what all are compared with."""
    found: dict[str, PagedAttention] = {"gathered": gathered, "blocked": blocked}
    if mesh.devices.flat[0].platform in (*GPUS, "cpu"):
        found["pallas"] = attention_of("pallas", mesh)
    return found


def run(check: Check) -> None:
    """All forms in all cases."""
    for case in CASES[: check.sizes.attention_cases]:
        _case(check, case)


def _case(check: Check, case: Case) -> None:
    inputs = _inputs(case, check)
    expected = _reference(case, inputs)
    for name, form in forms(check.mesh).items():
        check.measure(f"{case.name}: {name}", lambda form=form: _one(check, case, form, inputs, expected))


def _one(check: Check, case: Case, form: PagedAttention, inputs: tuple, expected: np.ndarray) -> Cell:
    attend = _jitted(case, form)
    difference = np.abs(_outputs(attend(*inputs), inputs) - expected) / np.maximum(1, np.abs(expected))
    worst, allowed = float(np.max(difference)), TOLERANCE[check.dtype]
    # Also if it is NaN.
    if not worst <= allowed:
        raise AssertionError(f"differs by {worst:.2e} from float32, more than {allowed}")
    return {"ms": 1e3 * median_seconds(lambda: attend(*inputs), check.sizes.runs), "difference": worst}


def _reference(case: Case, inputs: tuple) -> np.ndarray:
    """The plain form in float32, in whose products accelerators by default round to fewer bits."""
    *arrays, batch = inputs
    with jax.default_matmul_precision("highest"):
        wide = jax.tree.map(lambda array: array.astype(jnp.float32), arrays)
        return _outputs(_jitted(case, gathered)(*wide, batch), inputs)


def _jitted(case: Case, form: PagedAttention) -> Any:
    scale = case.heads[2] ** -0.5

    def attend(q: Any, k: Any, v: Any, pages: Any, batch: PagedBatch) -> jax.Array:
        return form(q, k, v, pages, batch, case.window, scale, case.softcap, None)

    return jax.jit(attend)


def _outputs(out: Any, inputs: tuple) -> np.ndarray:
    """What rows get that are not padding."""
    return np.asarray(out).astype(np.float32)[inputs[-1].query_lens > 0]


def _inputs(case: Case, check: Check) -> tuple[Any, Any, Any, Any, PagedBatch]:
    """(q, k, v, pages, batch): random, in a pool whose pages lie in any order."""
    scale = check.sizes.attention_scale
    contexts = [-(-context // scale) for context in case.contexts]
    num_rows, tokens, common = len(contexts), -(-case.tokens // scale), case.common // scale // PAGE
    num_heads, kv_heads, head_dim = case.heads
    needed = [-(-(context + tokens) // PAGE) for context in contexts]
    free = iter(1 + np.random.default_rng(0).permutation(sum(needed)))
    first = [int(next(free)) for _ in range(common)]
    batch = PagedBatch.empty(num_rows, max(needed))
    for row, (context, count) in enumerate(zip(contexts, needed, strict=True)):
        own = [int(next(free)) for _ in range(count - common)]
        batch.fill(row, first + own, context, tokens if context or tokens > 1 else 0, 0)
    if tokens == 1 and num_rows > 1:
        shared = shared_prefixes(batch.page_table, batch.context_lens, PAGE) if common else None
        batch = batch._replace(shared=shared or SharedPrefixes.none(num_rows))
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, check.dtype)

    q = normal(num_rows, tokens, num_heads, head_dim)
    k, v = (normal(num_rows, tokens, kv_heads, head_dim) for _ in range(2))
    pages = tuple(normal(kv_heads, 1 + sum(needed), PAGE, head_dim) for _ in range(2))
    return q, k, v, pages, batch
