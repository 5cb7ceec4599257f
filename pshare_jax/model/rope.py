"""Rotary position embeddings: their fields in config.json, and the cos/sin tables that layers apply.

`ModelConfig.from_hf` parses the fields; `Decoder` computes one table for each distinct `RopeConfig` of a model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pshare_jax.errors import PshareError

KNOWN_TYPES = ("default", "linear", "llama3", "yarn")
# Types whose frequencies depend on the length of the text, with the reason why they are refused.
LENGTH_DEPENDENT = {
    "dynamic": "its frequencies change while the text grows",
    "longrope": "its frequencies change when the text grows beyond the original length",
}


@dataclass(frozen=True)
class Yarn:
    """YaRN's fields (arXiv 2309.00071) beside `factor` and `original_max_len`.

    A pair that turns more than `beta_fast` times within the original length keeps its frequency, one that turns less than
    `beta_slow` times is scaled, with a linear ramp over the pairs between, whose ends are whole pairs with `truncate`.
    Cosines and sines are multiplied by `attention_factor`.
    """

    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclass(frozen=True)
class RopeConfig:
    """One rotary embedding.

    `factor` divides all frequencies (`linear`) or the low frequencies (`llama3`, `yarn`), as seen from
    `original_max_len`. The low and high factors are llama3's: wavelengths above `original_max_len / low_freq_factor` are
    scaled, below `original_max_len / high_freq_factor` not.
    """

    theta: float
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_len: int = 0
    yarn: Yarn | None = None

    @property
    def table_scale(self) -> float:
        """The factor on cosines and sines."""
        return self.yarn.attention_factor if self.yarn else 1.0

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each rotated pair, float32 `[head_dim // 2]`."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # NumPy's float32 power differs in the last bit between CPUs; rounded float64 powers equal torch's.
        powers = np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        plain = np.float32(1.0) / powers
        if self.type == "linear":
            return plain / np.float32(self.factor)
        if self.type == "llama3":
            return self._llama3(plain)
        if self.yarn is not None:
            return self._yarn(self.yarn, plain, np.float32(1.0) / (np.float32(self.factor) * powers))
        return plain

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        # Llama 3.1's three bands: long wavelengths are scaled, short wavelengths are not, a linear blend in between.
        wavelength = 2 * math.pi / plain
        blend = (self.original_max_len / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blend = np.clip(blend, 0.0, 1.0)
        return ((1 - blend) * plain / self.factor + blend * plain).astype(np.float32)

    def _yarn(self, yarn: Yarn, plain: np.ndarray, scaled: np.ndarray) -> np.ndarray:
        num_pairs = len(plain)
        first, last = (self._pair_with(num_turns, num_pairs) for num_turns in (yarn.beta_fast, yarn.beta_slow))
        if yarn.truncate:
            first, last = math.floor(first), math.ceil(last)
        # The upper bound is the number of dimensions and not of pairs, as in transformers and llama.cpp.
        first, last = max(first, 0), min(last, 2 * num_pairs - 1)
        width = last - first if last != first else 0.001
        share = np.clip((np.arange(num_pairs, dtype=np.float32) - first) / width, 0, 1).astype(np.float32)
        return (scaled * share + plain * (1 - share)).astype(np.float32)

    def _pair_with(self, num_turns: float, num_pairs: int) -> float:
        """The (fractional) index of the pair that turns so many times within the original length."""
        return num_pairs * math.log(self.original_max_len / (num_turns * 2 * math.pi)) / math.log(self.theta)


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosines and sines of every position, in float32, with an axis to broadcast over heads."""
    angles = positions[..., None, None].astype(jnp.float32) * rope.inverse_frequencies(head_dim)
    if rope.table_scale == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * rope.table_scale, jnp.sin(angles) * rope.table_scale


def rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T heads H"]:
    """Rotate the pairs (i, i + H/2) of every head; as in transformers, the tables are first cast to x's dtype."""
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def parse_rope(
    config: Mapping[str, Any],
    layer_type: str,
    *,
    old_theta_key: str,
    default_theta: float,
    old_scaling: bool,
    per_layer_type: bool,
) -> RopeConfig:
    """The rotary embedding of layers of `layer_type`, from either style of config.json.

    New files (transformers 5) have `rope_parameters`, flat or nested by layer type. Older files have the frequency base
    under `old_theta_key` and, with `old_scaling`, a `rope_scaling` object. A missing base means `default_theta`. Two
    different values are an error, and so are flat `rope_parameters` with `per_layer_type`.
    """
    new = _object(config, "rope_parameters")
    if any(isinstance(value, Mapping) for value in new.values()):
        # transformers has defaults for layer types that a Gemma 3 file leaves out.
        if layer_type not in new and not per_layer_type:
            raise PshareError(f"rope_parameters in config.json needs an entry '{layer_type}' for the model's layers.")
        new = _object(new, layer_type)
    elif new and per_layer_type:
        raise PshareError("rope_parameters in config.json must have an entry for each layer type of this family.")
    old = _object(config, "rope_scaling") if old_scaling else {}
    scaling = {key: _agreed(key, new.get(key), old.get(key)) for key in (*old, *new)}
    rope_type = _agreed("rope_type", scaling.get("rope_type"), scaling.get("type"))
    theta = _agreed("rope_theta", scaling.get("rope_theta"), config.get(old_theta_key))
    theta = _positive("rope_theta", default_theta if theta is None else theta)
    return _checked(rope_type or "default", theta, scaling, config)


def _object(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise PshareError(f"{key} in config.json must be an object, not {value!r}.")
    return value or {}


def _agreed(name: str, first: Any, second: Any) -> Any:
    if first is not None and second is not None and first != second:
        raise PshareError(f"config.json has two different values of {name}, {first} and {second}; keep one.")
    return second if first is None else first


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise PshareError(f"{name} in config.json must be a positive number, not {value!r}.")
    return float(value)


def _checked(rope_type: str, theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> RopeConfig:
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise PshareError(f"partial_rotary_factor in config.json must be 1.0, not {partial}.")
    if rope_type in LENGTH_DEPENDENT:
        raise PshareError(
            f"rope type '{rope_type}' is not supported, since {LENGTH_DEPENDENT[rope_type]}, and KV that was stored before "
            f"would be wrong; known types: {', '.join(KNOWN_TYPES)}."
        )
    if rope_type not in KNOWN_TYPES:
        raise PshareError(f"rope type '{rope_type}' is not supported; known types: {', '.join(KNOWN_TYPES)}.")
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type == "yarn":
        return _yarn(theta, scaling, config)
    needed = ["factor"] + (["low_freq_factor", "high_freq_factor"] if rope_type == "llama3" else [])
    missing = [key for key in needed if scaling.get(key) is None]
    if missing:
        raise PshareError(f"rope type '{rope_type}' needs {', '.join(missing)} in config.json.")
    factor = _positive("factor", scaling["factor"])
    if rope_type == "linear":
        return RopeConfig(theta, "linear", factor)
    original = _original_len(rope_type, scaling, config)
    low, high = (_positive(key, scaling[key]) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise PshareError(f"rope type 'llama3' needs low_freq_factor {low} below high_freq_factor {high}.")
    return RopeConfig(theta, "llama3", factor, low, high, original)


def _original_len(rope_type: str, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """The length that the model was trained on before its frequencies were scaled."""
    key = "original_max_position_embeddings"
    # As in transformers, a field of the file itself comes first.
    original = config.get(key) or scaling.get(key) or config.get("max_position_embeddings")
    if original is None:
        raise PshareError(f"rope type '{rope_type}' needs {key} in config.json.")
    return int(_positive(key, original))


def _yarn(theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> RopeConfig:
    """YaRN with transformers' defaults of missing fields."""

    def number(key: str) -> float | None:
        return None if scaling.get(key) in (None, 0) else _positive(key, scaling[key])

    original = _original_len("yarn", scaling, config)
    factor = number("factor")
    if factor is None:
        factor = _positive("max_position_embeddings", config.get("max_position_embeddings")) / original
    if theta <= 1:
        raise PshareError(f"rope type 'yarn' needs a rope_theta above 1 in config.json, not {theta}.")
    truncate = scaling.get("truncate", True)
    if not isinstance(truncate, bool):
        raise PshareError(f"truncate in config.json must be true or false, not {truncate!r}.")
    attention = number("attention_factor")
    if attention is None:
        over, under = number("mscale"), number("mscale_all_dim")
        attention = _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1.0)
    yarn = Yarn(number("beta_fast") or 32.0, number("beta_slow") or 1.0, attention, truncate)
    return RopeConfig(theta, "yarn", factor, original_max_len=original, yarn=yarn)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
