"""What the demo modules score on questions that they were not trained on: over the base's KV, alone, and against the base.

    python -m experiments.demo_modules [arithmetic] [functions] [reader] [--demo demo] [--json docs/demo.json]

The numbers go into the modules' cards too. Run it from the repository's root.
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
from pshare_jax.evaluation.evaluate import Answer, EvalResult, evaluate, load_any_module, wilson
from pshare_jax.evaluation.tasks import Task, open_task
from pshare_jax.settings import load_settings
from pshare_jax.share.model import Model, load
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.result import Reader, add_accuracy


@dataclass(frozen=True)
class Demo:
    """A module under the demo folder, trained by the config of its name; `task` None: unseen questions of its training task.

    `spoken`: the right answer is a word or number that can be found in a sentence, too.
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
    """Asks modules and base; writes the numbers and the cards, and prints the table of all modules asked so far."""
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
    parser.add_argument("names", nargs="*", help="modules to ask; absent: all")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="the modules' folder")
    parser.add_argument("--configs", type=Path, default=Path("configs/train"), help="the training configs' folder")
    parser.add_argument("--json", type=Path, default=Path("docs/demo.json"), help="the numbers, kept from run to run")
    options = parser.parse_args()
    if unknown := set(options.names) - set(DEMO_NAMES):
        parser.error(f"no such module: {', '.join(sorted(unknown))}; there are {', '.join(DEMO_NAMES)}")
    return options


def _row(demo: Demo, config: TrainConfig, base: Model, folder: Path) -> dict[str, Any]:
    told = demo.task or f"{training_task(config).partition('?')[0]}, questions not trained on"
    with _questions(demo, config, base) as task:
        asked: dict[Reader, EvalResult] = {
            "module": _asked(base, str(folder), task, demo.max_new_tokens, 1),
            "alone": _asked(base, str(folder), task, demo.max_new_tokens, 0),
            "base": _asked(base, "base", task, demo.max_new_tokens, 1),
        }
    for reader, result in asked.items():
        add_accuracy(folder, told, result.accuracy, reader)
    row: dict[str, Any] = {"task": told, "questions": demo.questions}
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
    with open_task(demo.task, base) as task:
        # Every second one of BFCL's 400, say.
        yield replace(task, items=task.items[:: len(task.items) // demo.questions][: demo.questions])


def _asked(base: Model, source: str, task: Task, max_new_tokens: int, ratio: float) -> EvalResult:
    module = load_any_module(source, base)
    result = evaluate(base, module, task.items, task.verifier, max_new_tokens=max_new_tokens, sharing_ratio=ratio)
    print(f"{source}, sharing ratio {ratio:g}: {result.accuracy:.1%} in {result.seconds:.0f} s", flush=True)
    return result


def _spoken(answer: Answer) -> bool:
    """Whether the right answer stands anywhere in the text, as a word: generous, since a question's own words count too."""
    return re.search(rf"(?<![\w.-]){re.escape(answer.expected)}(?!\w|\.\d)", answer.answer) is not None


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table of the README."""
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
