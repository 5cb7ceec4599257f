"""FLOPs and bytes that computations need, by a model's config: the numerators of MFU and of shares of the bandwidth. No jax.

A product of matrices is 2 m n k FLOPs. Attention counts visible keys alone, and norms, rotations and activations count
nothing, as is usual for MFU (PaLM, arXiv 2204.02311, appendix B). Bytes are what must be read or written once.
"""

from collections.abc import Collection
from dataclasses import dataclass

from pshare_jax.model.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes of the device's memory."""

    flops: float
    num_bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.num_bytes + other.num_bytes)


def projections(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each projection of a layer."""
    size, heads = config.hidden_size, config.num_heads * config.head_dim
    kv_heads, ffn = config.num_kv_heads * config.head_dim, config.ffn_size
    return {
        "q": (size, heads),
        "k": (size, kv_heads),
        "v": (size, kv_heads),
        "o": (heads, size),
        "gate": (size, ffn),
        "up": (size, ffn),
        "down": (ffn, size),
    }


def layer_weights(config: ModelConfig) -> int:
    """Weights of a layer's projections."""
    return sum(rows * columns for rows, columns in projections(config).values())


def prefill_weights(config: ModelConfig) -> int:
    """Weights that a prefill multiplies each token with: of the last layer only k and v, and no head."""
    last = sum(rows * columns for name, (rows, columns) in projections(config).items() if name in "kv")
    return (config.num_layers - 1) * layer_weights(config) + last


def head_weights(config: ModelConfig) -> int:
    """Weights of the head."""
    return config.vocab_size * config.hidden_size


def all_weights(config: ModelConfig) -> int:
    """Weights of a model, but for those of norms."""
    return config.num_layers * layer_weights(config) + (1 if config.tied else 2) * head_weights(config)


def adapter_weights(config: ModelConfig, rank: int, targets: Collection[str]) -> int:
    """Weights of a LoRA adapter."""
    layer = sum(rank * sum(sizes) for name, sizes in projections(config).items() if name in targets)
    return config.num_layers * layer


def kv_bytes(config: ModelConfig, item: int) -> int:
    """Bytes of a token's keys and values in all layers, of `item` bytes a number."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item


def attention_flops(config: ModelConfig, num_layers: int, pairs: float) -> float:
    """FLOPs of the two products of attention over so many pairs of a query and a visible key."""
    return 4.0 * num_layers * config.num_heads * config.head_dim * pairs


def causal_pairs(context: int, tokens: int) -> float:
    """Pairs of a new token and a token that it sees, itself included."""
    return tokens * context + tokens * (tokens + 1) / 2


def prefill(config: ModelConfig, context: int, tokens: int, item: int) -> Work:
    """A chunk of `tokens` tokens of one sequence behind `context` tokens."""
    weights = prefill_weights(config)
    attention = attention_flops(config, config.num_layers - 1, causal_pairs(context, tokens))
    return Work(2.0 * weights * tokens + attention, weights * item + kv_bytes(config, item) * (context + tokens))


def decode(
    config: ModelConfig, rows: int, context: int, item: int, adapters: int, rank: int, kernel_item: int | None = None
) -> Work:
    """A step of `rows` sequences with `context` tokens each, which have `adapters` LoRA adapters on all projections. Weights of
    layers have `kernel_item` bytes (None: `item`).
    """
    kernels, head = config.num_layers * layer_weights(config), head_weights(config)
    lora = adapter_weights(config, rank, projections(config))
    flops = 2.0 * (kernels + head + min(adapters, 1) * lora) * rows
    flops += attention_flops(config, config.num_layers, rows * (context + 1))
    read = kernels * (kernel_item or item) + (head + min(adapters, rows) * lora) * item
    return Work(flops, read + rows * kv_bytes(config, item) * (context + 1))


def handoff(config: ModelConfig, tokens: int, item: int, same_device: bool) -> Work:
    """KV on its way from a pool to another: read and written by gather and scatter, and between the two by a copy."""
    return Work(0.0, (6 if same_device else 4) * tokens * kv_bytes(config, item))


def training(config: ModelConfig, rows: int, prompt: int, answer: int, *, two_streams: bool, full: bool) -> float:
    """FLOPs of a step's losses and gradients, without what is computed a second time for the backward pass (as for MFU).

    `two_streams` (prefillshare): the base encodes the prompt but its last token, the module reads as many tokens as the answer
    has. One stream (full_ft): the module reads all tokens but the last. Where not all weights are trained (not `full`), the
    backward pass computes no gradients of weights.
    """
    layers, head = config.num_layers * layer_weights(config), head_weights(config) * answer
    read = answer if two_streams else prompt + answer - 1
    seen = causal_pairs(prompt - 1, answer) if two_streams else causal_pairs(0, read)
    forward = 2.0 * (layers * read + head)
    attention = attention_flops(config, config.num_layers, seen)
    step = (3 if full else 2) * forward + 3 * attention
    base = prefill(config, 0, prompt - 1, 0).flops if two_streams else 0.0
    return rows * (step + base)
