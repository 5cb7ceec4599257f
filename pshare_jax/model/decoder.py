"""The decoder of all families (Llama/SmolLM2, Qwen3, Gemma 3); a family is a `ModelConfig` and a name table.

It knows no cache layout: the caller passes `attend` (dense, paged or two-stream), which stores k and v and returns the
attention output. Layers are unrolled, which decodes 2-3x faster on CPU than a scan over stacked weights.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pshare_jax.model.config import LayerConfig, ModelConfig
from pshare_jax.model.layers import MLP, AttentionProjections, Build, norm, soft_cap
from pshare_jax.model.rope import RopeConfig, rope_tables, rotate

Attend = Callable[[int, Array | None, Array, Array, Any], tuple[Array | None, Any]]
"""attend(layer, q[B,T,N,H] | None, k[B,T,K,H], v[B,T,K,H], kv) -> (out[B,T,N,H] | None, kv); no q: only store k, v."""


class Embedding(nnx.Module):
    """Token embeddings `[V, D]`, scaled if the family does so; also the head of tied models.

    In training the weight may be wider than the model's dtype: its gradient sums over all occurrences of a token.
    """

    def __init__(self, config: ModelConfig, build: Build):
        self.weight = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), build.dtype))
        self.scale, self.dtype = config.embed_scale, build.dtype

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embed the tokens."""
        return self.scaled(self.weight[...][tokens])

    def scaled(self, rows: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Rows of the weight as embeddings."""
        x = rows.astype(self.dtype)
        # transformers also rounds the scale to bfloat16.
        return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)


class DecoderLayer(nnx.Module):
    """Attention and MLP with pre-norms, and with post-norms ("sandwich") if the family has them."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, build: Build):
        size = config.hidden_size
        self.rope = layer.rope
        self.attention = AttentionProjections(config, build)
        self.mlp = MLP(config, build)
        self.pre_attention_norm = norm(config, size, build)
        self.pre_mlp_norm = norm(config, size, build)
        self.post_attention_norm = norm(config, size, build) if config.sandwich_norms else None
        self.post_mlp_norm = norm(config, size, build) if config.sandwich_norms else None

    def __call__(
        self, index: int, x: Float[Array, "B T D"], rope: tuple[Array, Array], attend: Attend, kv: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """One layer over all positions; `attend` receives rotated q and k."""
        normed = self.pre_attention_norm(x)
        q = rotate(self.attention.query(normed), *rope)
        k, v = self._key_value(normed, rope)
        heads, kv = attend(index, q, k, v, kv)
        assert heads is not None
        y = self.attention.output(heads)
        x = x + (y if self.post_attention_norm is None else self.post_attention_norm(y))
        y = self.mlp(self.pre_mlp_norm(x))
        return x + (y if self.post_mlp_norm is None else self.post_mlp_norm(y)), kv

    def store(self, index: int, x: Float[Array, "B T D"], rope: tuple[Array, Array], attend: Attend, kv: Any) -> Any:
        """Compute only the layer's KV: norm, k and v. For the last layer of a prefill, whose output is not used."""
        return attend(index, None, *self._key_value(self.pre_attention_norm(x), rope), kv)[1]

    def _key_value(self, normed: Array, rope: tuple[Array, Array]) -> tuple[Array, Array]:
        return rotate(self.attention.key(normed), *rope), self.attention.value(normed)


def ropes_of(config: ModelConfig, positions: Int[Array, "B T"]) -> dict[RopeConfig, tuple[Array, Array]]:
    """The tables of all rotations that layers have."""
    ropes = {layer.rope: None for layer in config.layers}
    return {rope: rope_tables(rope, config.head_dim, positions) for rope in ropes}


def prefill_reads(path: str, config: ModelConfig) -> bool:
    """Whether `Decoder.prefill` uses the parameter: in the last layer only norm, k and v, and no head."""
    last = f"layers.{config.num_layers - 1}."
    if path.startswith(last):
        return path.startswith((f"{last}pre_attention_norm.", f"{last}attention.k", f"{last}attention.v"))
    return path not in ("head", "final_norm.weight")


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head: a function of tokens, absolute positions and the caller's `attend`."""

    def __init__(self, config: ModelConfig, build: Build):
        self.config = config
        self.embedding = Embedding(config, build)
        self.layers = nnx.List([DecoderLayer(config, layer, build) for layer in config.layers])
        self.final_norm = norm(config, config.hidden_size, build)
        self.head = None if config.tied else nnx.Param(jnp.zeros((config.hidden_size, config.vocab_size), build.dtype))

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend, kv: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states (normalised, the input of `logits`) and the new kv."""
        x, kv = self.through_layers(len(self.layers), self.embedding(tokens), positions, attend, kv)
        return self.final_norm(x), kv

    def prefill(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend, kv: Any) -> Any:
        """Only the new kv: no head, and in the last layer only norm, k and v."""
        return self.stored(self.embedding(tokens), positions, attend, kv)

    def through_layers(
        self, num_layers: int, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend, kv: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The embedded tokens `x` after the first layers, and the new kv."""
        ropes = self._ropes(positions)
        for index in range(num_layers):
            layer = self.layers[index]
            x, kv = layer(index, x, ropes[layer.rope], attend, kv)
        return x, kv

    def stored(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], attend: Attend, kv: Any) -> Any:
        """The new kv of the embedded tokens `x`, as in `prefill`."""
        last = len(self.layers) - 1
        x, kv = self.through_layers(last, x, positions, attend, kv)
        layer = self.layers[last]
        return layer.store(last, x, self._ropes(positions)[layer.rope], attend, kv)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Next-token logits in float32."""
        spec = "BTD,VD->BTV" if self.head is None else "BTD,DV->BTV"
        scores = jnp.einsum(spec, hidden, self.head_weight, preferred_element_type=jnp.float32)
        return soft_cap(scores, self.config.final_softcap)

    @property
    def head_weight(self) -> Float[Array, "D V"] | Float[Array, "V D"]:
        """The matrix of the logits: the head `[D, V]`, or the embedding `[V, D]` of a tied model."""
        return self.embedding.weight[...].astype(self.embedding.dtype) if self.head is None else self.head[...]

    def _ropes(self, positions: Array) -> dict:
        return ropes_of(self.config, positions)
