"""Accuracy of the demo modules, over the base's KV and run alone, and of the base.

    python -m experiments.demo_modules [arithmetic] [functions] [reader] [--demo demo] [--json docs/demo.json]

The numbers are also written to the modules' cards. Run it from the repository's root.
"""

import argparse
import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.held_out import held_out, training_task
from pshare_jax.compilation_cache import cache_folder, keep_programs
from pshare_jax.evaluation.evaluate import Answer, EvalResult, evaluate, load_any_module
from pshare_jax.evaluation.intervals import wilson
from pshare_jax.evaluation.tasks import Task, open_task
from pshare_jax.settings import load_settings
from pshare_jax.share.model import Model, load
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.model_card import Reader, add_accuracy


@dataclass(frozen=True)
class Demo:
    """A module in the demo folder, trained by the config of its name. `task` None: unseen questions of its data.

    `spoken`: the right answer is a word or number, which may also occur within a sentence.
    """

    name: str
    questions: int
    max_new_tokens: int
    spoken: bool
    task: str | None = None


DEMOS = (
    Demo("arithmetic", 300, 32, spoken=True),
    Demo("functions", 200, 128, spoken=False, task="bfcl:simple"),
    Demo("reader", 300, 32, spoken=True),
)
DEMO_NAMES = [demo.name for demo in DEMOS]


def main() -> None:
    """Evaluates modules and base, writes numbers and cards, and prints the table of all modules evaluated so far."""
    options = _options()
    keep_programs(cache_folder())
    rows: dict[str, dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for demo in [demo for demo in DEMOS if demo.name in (options.names or DEMO_NAMES)]:
        config = load_settings(TrainConfig, options.configs / f"{demo.name}.yaml", [])
        rows[demo.name] = _row(demo, config, load(config.base, dtype="float32"), options.demo / demo.name)
        options.json.write_text(json.dumps({name: rows[name] for name in DEMO_NAMES if name in rows}, indent=2) + "\n")
    print(markdown(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo_modules", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("names", nargs="*", help="modules to evaluate; default: all")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="folder of the modules")
    parser.add_argument("--configs", type=Path, default=Path("configs/train"), help="folder of the train configs")
    parser.add_argument("--json", type=Path, default=Path("docs/demo.json"), help="file of the numbers, updated")
    options = parser.parse_args()
    if unknown := set(options.names) - set(DEMO_NAMES):
        parser.error(f"unknown module: {', '.join(sorted(unknown))}; choose from {', '.join(DEMO_NAMES)}")
    return options


def _row(demo: Demo, config: TrainConfig, base: Model, folder: Path) -> dict[str, Any]:
    task_name = demo.task or f"{training_task(config).partition('?')[0]}, questions not trained on"
    with _questions(demo, config, base) as task:
        asked: dict[Reader, EvalResult] = {
            "module": _asked(base, str(folder), task, demo.max_new_tokens, 1),
            "alone": _asked(base, str(folder), task, demo.max_new_tokens, 0),
            "base": _asked(base, "base", task, demo.max_new_tokens, 1),
        }
    for reader, result in asked.items():
        add_accuracy(folder, task_name, result.accuracy, reader)
    row: dict[str, Any] = {"task": task_name, "questions": demo.questions}
    row |= {reader: result.accuracy for reader, result in asked.items()}
    if demo.spoken:
        row["base, anywhere"] = sum(map(_spoken, asked["base"].answers)) / demo.questions
    return row


@contextlib.contextmanager
def _questions(demo: Demo, config: TrainConfig, base: Model) -> Iterator[Task]:
    if demo.task is None:
        with held_out(config, base, demo.questions) as task:
            yield task
        return
    with open_task(demo.task, base, config.module.style) as task:
        # Evenly spaced, such as every second of BFCL's 400.
        yield replace(task, items=task.items[:: len(task.items) // demo.questions][: demo.questions])


def _asked(base: Model, source: str, task: Task, max_new_tokens: int, ratio: float) -> EvalResult:
    modules = {source: load_any_module(source, base)}
    results = evaluate(base, modules, task.items, task.verifier, max_new_tokens=max_new_tokens, sharing_ratio=ratio)
    result = results[source]
    print(f"{source}, sharing ratio {ratio:g}: {result.accuracy:.1%} in {result.seconds:.0f} s", flush=True)
    return result


def _spoken(answer: Answer) -> bool:
    """Whether the right answer occurs as a word; generous, since the text may repeat words of the question."""
    return re.search(rf"(?<![\w.-]){re.escape(answer.expected)}(?!\w|\.\d)", answer.answer) is not None


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table for the README."""
    lines = [
        "| module | asked | over the base's KV | alone | the base | the base, right answer anywhere in its text |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        count = row["questions"]
        low, high = wilson(round(row["module"] * count), count)
        spoken = f"{row['base, anywhere']:.1%}" if "base, anywhere" in row else "-"
        shared = f"**{row['module']:.1%}** ({low:.1%} to {high:.1%})"
        asked = f"{count} of {row['task']}"
        lines.append(f"| `{name}` | {asked} | {shared} | {row['alone']:.1%} | {row['base']:.1%} | {spoken} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
