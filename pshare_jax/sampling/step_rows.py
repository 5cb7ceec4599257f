"""The rows of one sampling step in one array, so that a step sends its devices one array of a few words a row.

engine/sampler.py keeps the row of each slot and sends those of a step's sequences; row_state.py reads them on the device.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float32, Int32

from pshare_jax.sampling.params import SamplingParams, SamplingRows

ROW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("seed_high", np.uint32),
        ("seed_low", np.uint32),
        ("choice", np.uint32),
        ("position", np.uint32),
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("slot", np.int32),
        ("adjusted", np.int32),
        ("banned", np.int32),
        ("masked", np.int32),
        ("reported", np.int32),
    ]
)
"""`SamplingParams` of a row, its slot and position; whether steps 1 to 3 may change its scores, whether its banned ids are
banned now, whether it has a mask, and whether its logprobs are reported. Every column has 32 bits."""


class StepRows(NamedTuple):
    """The columns of `ROW` on the device."""

    sampling: SamplingRows
    frequency_penalty: Float32[Array, "B"]
    presence_penalty: Float32[Array, "B"]
    slot: Int32[Array, "B"]
    adjusted: Bool[Array, "B"]
    banned: Bool[Array, "B"]
    masked: Bool[Array, "B"]
    reported: Bool[Array, "B"]


def row_of(params: SamplingParams, slot: int, masked: bool = False, reported: bool = False) -> Any:
    """The row of a sequence in `slot`, but for its position and bans."""
    row = np.zeros((), ROW)
    # Rounding to float32 may lift a greedy temperature above the limit, so it is written as 0.
    row["temperature"] = 0 if params.is_greedy else params.temperature
    # The two halves of a 64-bit seed, as jax.random.key splits it when 64-bit types are enabled.
    row["seed_high"], row["seed_low"] = params.seed >> 32 & 0xFFFFFFFF, params.seed & 0xFFFFFFFF
    for name in ("top_k", "top_p", "min_p", "choice", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        row[name] = getattr(params, name)
    row["slot"], row["adjusted"], row["masked"], row["reported"] = slot, params.needs_adjustments, masked, reported
    return row[()]


def packed(rows: np.ndarray) -> Int32[np.ndarray, "B columns"]:
    """Rows of the type `ROW` as words."""
    return rows.view(np.int32).reshape(len(rows), -1)


def unpacked(step: Int32[ArrayLike, "B columns"]) -> StepRows:
    """The columns on the device."""
    types = {name: jnp.dtype(ROW[name]) for name in ROW.names or ()}
    words = jnp.asarray(step)
    column: dict[str, Any] = {name: lax.bitcast_convert_type(words[:, i], types[name]) for i, name in enumerate(types)}
    seed: Any = jnp.stack([column.pop("seed_high"), column.pop("seed_low")], axis=-1)
    sampling = SamplingRows(seed=seed, **{name: column.pop(name) for name in SamplingRows._fields if name != "seed"})
    flags = {name: column.pop(name) != 0 for name in ("adjusted", "banned", "masked", "reported")}
    return StepRows(sampling, **column, **flags)
