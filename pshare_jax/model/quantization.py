"""Quantised kernels: eight bits a weight and a float32 scale for each output channel, kernel = values * scale.

The scale is the channel's largest magnitude over the form's largest number (symmetric; no zero points). Only kernels of layers
have the form: embedding, norms and head stay in the model's dtype. In config.json it is a `quantization_config` in the format of
compressed-tensors, which transformers and llm-compressor use: `weight` `[out, in]` with `weight_scale` `[out, 1]`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Array, Float, Num

from pshare_jax.errors import PshareError

WeightForm = Literal["int8", "float8_e4m3fn"]
"""The dtype of quantised kernels."""
FORMS: tuple[WeightForm, ...] = get_args(WeightForm)
_MOST = {"int8": 127.0, "float8_e4m3fn": float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)}
_FORMATS: dict[WeightForm, tuple[str, str]] = {
    "int8": ("int-quantized", "int"),
    "float8_e4m3fn": ("float-quantized", "float"),
}
"""compressed-tensors' names of a form: of the file's format, and of the number's kind."""


def quantized(weight: Float[np.ndarray, "O I"], form: WeightForm) -> tuple[np.ndarray, Float[np.ndarray, "O 1"]]:
    """The values of a weight in file orientation in this form, and their scales."""
    wide = weight.astype(np.float32)
    scale = np.abs(wide).max(axis=1, keepdims=True) / np.float32(_MOST[form])
    # A channel of zeros.
    scale[scale == 0] = 1
    scaled = wide / scale
    return (np.rint(scaled) if form == "int8" else scaled).astype(form), scale


def dequantized(params: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """The parameters with all kernels, of layers or stacks of layers, in `dtype`; those without a scale are themselves."""
    plain = {}
    for path, array in params.items():
        scale = params.get(scale_path(path))
        if scale is not None:
            plain[path] = _multiply(array.sharding, dtype)(array, scale)
        elif not is_scale(path):
            plain[path] = array
    return plain


@functools.cache
def _multiply(sharding: Sharding, dtype: str) -> Callable[[Array, Array], Array]:
    def multiply(kernel: Num[Array, "... I O"], scale: Float[Array, "... 1 O"]) -> Float[Array, "... I O"]:
        return (kernel.astype(jnp.float32) * scale).astype(dtype)

    return jax.jit(multiply, out_shardings=sharding)


def cast_params(params: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """The parameters in another dtype, except quantised kernels and their scales; those that have it already are themselves."""
    return {
        path: array if is_scale(path) or scale_path(path) in params else array.astype(dtype)
        for path, array in params.items()
    }


def scale_path(kernel: str) -> str:
    """The path of a kernel's scale."""
    return f"{kernel}_scale"


def is_scale(path: str) -> bool:
    """Whether the parameter is the scale of a quantised kernel."""
    return path.endswith(".kernel_scale")


# --- config.json -----------------------------------------------------------------------------------------------------


def weight_form(config: Mapping[str, Any]) -> WeightForm | None:
    """The form of the kernels of a model with this config.json; None if they are not quantised.

    Activations are never quantised, even where the config asks for it as they are computed (`dynamic`).

    Raises:
        PshareError: they are quantised in another way.
    """
    text = config.get("text_config")
    inner = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = config.get("quantization_config") or inner
    if not found:
        return None
    for form in FORMS:
        if isinstance(found, Mapping) and _has_form(found, form):
            return form
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    raise PshareError(
        f"config.json has a quantization_config of the method {method!r} that is not supported: only compressed-tensors with "
        "8-bit weights and one symmetric scale for each output channel is; use the unquantised model, or quantise it with "
        "pshare-quantize."
    )


def _has_form(config: Mapping[str, Any], form: WeightForm) -> bool:
    groups, (file_format, kind) = config.get("config_groups"), _FORMATS[form]
    if config.get("quant_method") != "compressed-tensors" or config.get("kv_cache_scheme"):
        return False
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return False
    [group] = groups.values()
    if not isinstance(group, Mapping) or (group.get("format") or config.get("format")) != file_format:
        return False
    wanted = {"type": kind, "num_bits": 8, "strategy": "channel"}
    weights, inputs = group.get("weights"), group.get("input_activations") or {"dynamic": True}
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping):
        return False
    same = all(weights.get(name) == value for name, value in wanted.items()) and weights.get("symmetric", True) is True
    return same and inputs.get("dynamic") is True and not group.get("output_activations")


def quantization_config(form: WeightForm) -> dict[str, Any]:
    """The `quantization_config` of a model in this form."""
    file_format, kind = _FORMATS[form]
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        # Without it compressed-tensors takes int8 to be packed, where activations are not quantised.
        "format": file_format,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": file_format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
