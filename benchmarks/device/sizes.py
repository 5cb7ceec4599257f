"""The models' shapes and the sizes of all parts: for an accelerator, and tiny ones that a CPU runs in the tests. No jax."""

import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from benchmarks.agents_load.config import WorkloadConfig
from pshare_jax.model.config import ModelConfig
from pshare_jax.training.config import Method

Kind = Literal["full", "lora"]

RANK = 16
TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""The rank and projections of all LoRA adapters here."""
PAGE = 16
"""Tokens of a page."""

_LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "vocab_size": 128_256}
_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "rope_parameters": {**_LLAMA_ROPE, "factor": 32.0},
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA_ROPE, "factor": 8.0},
    },
    "qwen3-1.7b": {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "tiny": {
        **_LLAMA,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}
NAMES = tuple(_SHAPES)


def shape(name: str) -> ModelConfig:
    """The config of a model of this name."""
    return ModelConfig.from_hf(_SHAPES[name])


@dataclass(frozen=True)
class TrainingSizes:
    """Samples of a step, and the tokens of a sample's prompt and answer."""

    rows: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class Sizes:
    """What the parts measure. `models`: the first is measured by all parts, the others by prefill and decode.

    Lengths are in tokens. `runs` are repetitions, of which tables have the median; `decode_steps` follow one another in each.
    `precision` are pairs of method and kind of module. `agent_rows`, `agent_chunks` and `chunk` are the shapes of the agents'
    engine, and `agent_seconds` cuts a run of agents. `start_rows` are the decode rows of the engine that only starts (None: the
    platform's); with `start_all` it compiles all programs.
    """

    models: tuple[str, ...] = ("llama-3.2-1b", "llama-3.1-8b", "qwen3-1.7b")
    runs: int = 5
    matmul: int = 8192
    copy_bytes: int = 2**31
    precision: tuple[tuple[Method, Kind], ...] = tuple(itertools.product(get_args(Method), get_args(Kind)))
    attention_scale: int = 1
    attention_cases: int | None = None
    chunk: int = 2048
    prefill: tuple[int, ...] = (4096, 512, 16_384)
    decode_rows: tuple[int, ...] = (32, 1, 64, 8)
    decode_contexts: tuple[int, ...] = (8192, 1024)
    decode_tasks: tuple[int, ...] = (1, 4)
    decode_steps: int = 8
    handoff: int = 8192
    agent_tasks: tuple[int, ...] = (8, 4)
    agents: WorkloadConfig = WorkloadConfig(
        sessions=16, turns=3, context=8192, instruction=64, output=128, tool_output=256
    )
    agent_chunks: tuple[int, ...] = (64, 512, 1024)
    agent_rows: tuple[int, ...] = (4, 16)
    agent_seconds: float = 30.0
    training: TrainingSizes = TrainingSizes(4, 1536, 512)
    start_rows: int | None = None
    start_all: bool = True


FULL = Sizes()
TINY = replace(
    FULL,
    models=("tiny",),
    runs=1,
    matmul=128,
    copy_bytes=2**20,
    precision=(("prefillshare", "lora"),),
    attention_scale=32,
    attention_cases=2,
    chunk=32,
    prefill=(32, 64),
    decode_rows=(2,),
    decode_contexts=(64,),
    decode_tasks=(2,),
    decode_steps=2,
    handoff=64,
    agent_tasks=(2,),
    agents=WorkloadConfig(sessions=2, turns=1, context=64, instruction=8, output=4, tool_output=8, vocab_size=256),
    agent_chunks=(16,),
    agent_rows=(2,),
    agent_seconds=20.0,
    training=TrainingSizes(2, 24, 8),
    start_rows=2,
    start_all=False,
)
