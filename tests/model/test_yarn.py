"""YaRN: frequencies and tables equal transformers' for all its fields, and the context length is the one it extends to."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import assert_close, tiny_config
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from pshare_jax.errors import PshareError
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.rope import rope_tables

CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""What Qwen3's model card says to write into config.json."""
ODD = {"rope_type": "yarn", "factor": 3.5, "original_max_position_embeddings": 100}
FIELDS: dict[str, dict[str, Any]] = {
    "card": CARD,
    "odd": ODD,
    "betas": {**ODD, "beta_fast": 17, "beta_slow": 1.5},
    "not truncated": {**ODD, "truncate": False},
    "attention_factor": {**ODD, "attention_factor": 1.7},
    "mscale": {**ODD, "mscale": 0.8, "mscale_all_dim": 1.3},
    "mscale alone": {**ODD, "mscale": 0.8},
    "factor from the lengths": {**ODD, "factor": None},
    "without original length": {"rope_type": "yarn", "factor": 2.5},
    "factor below one": {**ODD, "factor": 0.5},
    "ramp between two pairs": {**ODD, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def config_of(rope: dict[str, Any], field: str = "rope_parameters", head_dim: int = 32) -> dict[str, Any]:
    content = tiny_config("qwen3", head_dim=head_dim, max_position_embeddings=700)
    del content["rope_parameters"]
    if field == "rope_scaling":
        return {**content, "rope_theta": 54321.0, "rope_scaling": rope}
    return {**content, "rope_parameters": {**rope, "rope_theta": 54321.0}}


@pytest.mark.parametrize("head_dim", [24, 128])
@pytest.mark.parametrize("name", FIELDS)
def test_tables(name, head_dim):
    content = config_of(FIELDS[name], head_dim=head_dim)
    ours = ModelConfig.from_hf(content).layers[0].rope
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**content))
    np.testing.assert_allclose(ours.inverse_frequencies(head_dim), theirs.inv_freq.numpy(), rtol=1e-6)
    positions = np.arange(0, 600, 7)[None]
    tables = rope_tables(ours, head_dim, jnp.asarray(positions))
    for got, expected in zip(tables, theirs(torch.zeros(1), torch.tensor(positions)), strict=True):
        assert_close(got[:, :, 0], expected.numpy()[..., : head_dim // 2])


def test_old_spellings_are_the_same():
    new = ModelConfig.from_hf(config_of(ODD))
    oldest = {"type": "yarn", **{key: value for key, value in ODD.items() if key != "rope_type"}}
    for rope in (ODD, oldest):
        assert ModelConfig.from_hf(config_of(rope, "rope_scaling")) == new
    above = {**config_of({"rope_type": "yarn", "factor": 3.5}), "original_max_position_embeddings": 100}
    assert ModelConfig.from_hf(above) == new


@pytest.mark.parametrize(("name", "expected"), [("card", 131072), ("odd", 350), ("factor from the lengths", 700)])
def test_context_length_is_the_extended(name, expected):
    assert ModelConfig.from_hf(config_of(FIELDS[name])).max_len == expected


def test_fingerprint_fields_change_only_with_yarn():
    """Modules of bases without yarn keep their fingerprint."""
    plain = ModelConfig.from_hf(tiny_config("qwen3")).layer_fields()["layers"][0]["rope"]
    assert set(plain) == {"theta", "type", "factor", "low_freq_factor", "high_freq_factor", "original_max_len"}
    yarn = [ModelConfig.from_hf(config_of({**ODD, "beta_fast": beta})).layer_fields() for beta in (16, 17)]
    assert yarn[0] != yarn[1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"factor": "4"}, "factor"),
        ({"beta_fast": -1}, "beta_fast"),
        ({"truncate": "no"}, "truncate"),
        ({"attention_factor": float("inf")}, "attention_factor"),
        ({"original_max_position_embeddings": "100"}, "original_max_position_embeddings"),
    ],
)
def test_error_names_a_wrong_field(changes, named):
    with pytest.raises(PshareError, match=named):
        ModelConfig.from_hf(config_of({**ODD, **changes}))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_types_that_depend_on_the_length_are_refused_with_the_reason(name, field, key):
    with pytest.raises(PshareError, match=f"'{name}' is not supported, since its frequencies change .*stored before"):
        ModelConfig.from_hf(config_of({key: name, "factor": 2.0}, field))
