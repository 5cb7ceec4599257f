"""Task accuracy of decode modules: an engine's greedy answers to a task's questions, scored by the task's verifier.

`pshare-evaluate`, or `python -m pshare_jax.evaluation.evaluate`; experiments call `evaluate`. With a sharing ratio below 1
the module encodes the rest of the prompt itself, which also shows the effect of naive sharing on a full fine-tune.
"""

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pshare_jax.compilation_cache import cache_folder, keep_programs
from pshare_jax.engine.config import BatchConfig, EngineConfig, KVConfig, LimitsConfig, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.handle import Result
from pshare_jax.engine.request import Request, check_request
from pshare_jax.engine.shapes import pages_for
from pshare_jax.errors import PshareError
from pshare_jax.evaluation.intervals import wilson
from pshare_jax.evaluation.tasks import Item, Task, open_task
from pshare_jax.evaluation.verifiers import Verifier
from pshare_jax.model.kv.dense import bucket
from pshare_jax.share.boundary import response_start_at
from pshare_jax.share.decode_module import DecodeModule, load_module, read_manifest
from pshare_jax.share.model import DTYPES, Model, load
from pshare_jax.training.model_card import Reader, add_accuracy


@dataclass(frozen=True)
class Answer:
    """An answered question: texts, the verifier's score, and whether the answer was cut at max_new_tokens."""

    name: str
    prompt: str
    answer: str
    expected: str
    score: float
    cut: bool


@dataclass(frozen=True)
class EvalResult:
    """All answers in the items' order, their number of tokens, and the seconds of compiling, generating and scoring."""

    answers: list[Answer]
    num_tokens: int
    seconds: float

    @property
    def num_right(self) -> int:
        """Number of answers with the full score of 1."""
        return sum(answer.score >= 1 for answer in self.answers)

    @property
    def accuracy(self) -> float:
        """Share of answers with the full score."""
        return self.num_right / len(self.answers)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy."""
        return wilson(self.num_right, len(self.answers))

    @property
    def mean_score(self) -> float:
        """Mean of the scores, with partial scores."""
        return sum(answer.score for answer in self.answers) / len(self.answers)

    def summary(self, num_samples: int = 5) -> dict[str, Any]:
        """Plain values for JSON: the numbers, every score in order, and the first right and wrong answers."""
        groups = {
            "right": [answer for answer in self.answers if answer.score >= 1],
            "wrong": [answer for answer in self.answers if answer.score < 1],
        }
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "mean_score": self.mean_score,
            "num_items": len(self.answers),
            "num_cut": sum(answer.cut for answer in self.answers),
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "scores": [answer.score for answer in self.answers],
            **{name: [asdict(answer) for answer in group[:num_samples]] for name, group in groups.items()},
        }


def evaluate(
    base: Model,
    modules: Mapping[str, DecodeModule],
    items: Sequence[Item],
    verifier: Verifier,
    *,
    max_new_tokens: int,
    sharing_ratio: float = 1.0,
    rows: int = 16,
    progress: Callable[[int], None] | None = None,
) -> dict[str, EvalResult]:
    """Scored greedy answers of all modules to all items (at least one); modules share the base's prefill of an item.

    Of a prompt's n tokens the base encodes the first floor(sharing_ratio * (n - 1)) and the module the rest: 1 is
    PrefillShare, and with 0 the module prefills with its own weights; an activated LoRA has its own boundary. At most
    `rows` answers are generated at a time.
    `progress` is called with 1, 2, ... as answers end.

    Raises:
        PshareError: no items, a number out of range, a prompt that is too long, or a module on other devices.
    """
    if not items:
        raise PshareError("There are no questions to evaluate; the task must have at least one.")
    if not 0 <= sharing_ratio <= 1:
        raise PshareError(f"The sharing ratio must be from 0 to 1, not {sharing_ratio}.")
    activated = [name for name, module in modules.items() if module.boundary.invocation]
    if activated and 0 < sharing_ratio < 1:
        raise PshareError(
            f"{activated[0]} is an activated LoRA, which has its own boundary; use a sharing ratio of 1 or 0."
        )
    if rows < 1:
        raise PshareError(f"The number of rows must be at least 1, not {rows}.")
    requests = [
        Request(
            f"question {index + 1}, {task}",
            task,
            item.prompt_ids,
            max_new_tokens,
            stop_ids=base.stop_ids | base.tokenizer.turn_ends(module.style),
            response_start=response_start_at(len(item.prompt_ids), sharing_ratio) if sharing_ratio else None,
        )
        for index, item in enumerate(items)
        for task, module in modules.items()
    ]
    for request in requests:
        # Before the pools are made, whose size follows from the longest prompt.
        check_request(request, base.config.vocab_size, base.config.max_len)
    started = time.perf_counter()
    engine = _engine(base, modules, requests, rows, alone=sharing_ratio == 0)
    answers = engine.run(requests, progress)
    generated = time.perf_counter() - started
    # Its objects refer to each other, and its pools must be gone before the next engine's are made.
    del engine
    gc.collect()
    results = {}
    for index, task in enumerate(modules):
        started, own = time.perf_counter(), answers[index :: len(modules)]
        scored = [_scored(base, item, answer, verifier) for item, answer in zip(items, own, strict=True)]
        seconds = generated + time.perf_counter() - started
        results[task] = EvalResult(scored, sum(len(answer.ids) for answer in own), seconds)
    return results


def _engine(
    base: Model, modules: Mapping[str, DecodeModule], requests: Sequence[Request], rows: int, alone: bool
) -> Engine:
    """Prefill and decode on the base's own devices, with pages for `rows` of the longest sequences.

    Pages and rows are rounded up to a few sizes, so that evaluations share compiled programs.
    """
    devices = [jax.devices().index(device) for device in base.mesh.devices.flat]
    rows = min(rows, bucket(len(requests), smallest=1))
    longest = bucket(max(len(request.prompt) + request.max_tokens for request in requests) + 1)
    pages = (1 + rows * pages_for(longest, KVConfig.page_size)) * (len(modules) if alone else 1)
    return Engine.build(
        base,
        EngineConfig(
            tasks=modules,
            sharing="isolated" if alone else "shared",
            placement=placed([devices], [devices]),
            kv=KVConfig(pages=max(3, pages)),
            batch=BatchConfig(decode_rows=rows),
            # With more requests than rows the pool would be shared by more sequences than it is made for.
            limits=LimitsConfig(max_requests=rows, stall_seconds=math.inf),
        ),
    )


def _scored(base: Model, item: Item, answer: Result, verifier: Verifier) -> Answer:
    prompt = base.tokenizer.decode(item.prompt_ids, skip_special_tokens=False)
    cut = answer.finish_reason != "stop"
    return Answer(item.name, prompt, answer.text, item.expected, verifier(answer.text, item.record), cut)


# --- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates a module on a task and prints its accuracy; the exit status is 2 after a user's mistake."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except PshareError as error:
        print(f"pshare-evaluate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pshare-evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", required=True, help="the base: a folder, .gguf, hub name or pypi:package")
    parser.add_argument("--module", required=True, help="folder of a decode module or a full fine-tune, or: base")
    parser.add_argument(
        "--task",
        required=True,
        help="reasoning_gym:<task>?size=500&seed=7, bfcl:simple, bfcl:multiple, a data file such as data.jsonl, or a YAML file "
        "with path and verifier",
    )
    parser.add_argument(
        "--run-code", action="store_true", help="allow a task with verifier: code to run programs that the model writes"
    )
    parser.add_argument("--sharing-ratio", type=float, default=1.0, help="share that the base encodes (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default 256)")
    parser.add_argument("--rows", type=int, default=16, help="answers generated at a time (default 16)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--output", type=Path, help="also write the numbers and some answers to this JSON file")
    parser.add_argument("--card", type=Path, help="also write the accuracy into this decode module's model card")
    return parser


def _run(options: argparse.Namespace) -> None:
    if options.output and not options.output.parent.is_dir():
        raise PshareError(f"--output: {options.output.parent} is not a folder; create it first.")
    if options.card:
        _check_card(options)
    keep_programs(cache_folder())
    base = load(options.base, dtype=options.dtype)
    module = load_any_module(options.module, base)
    with open_task(options.task, base, module.style, run_code=options.run_code) as task:
        if task.report and any(source.dropped or source.left_out for source in task.report.sources):
            print("\n".join(map(str, task.report.sources)), file=sys.stderr)
        print(*task.notes, sep="\n", end="\n" if task.notes else "", file=sys.stderr)
        result = _shown(base, module, task, options)
    low, high = result.interval
    print(
        f"{options.task}: {result.accuracy:.1%} right ({result.num_right} of {len(result.answers)}; "
        f"95 % interval {low:.1%} to {high:.1%}), {result.seconds:.1f} s"
    )
    if options.output:
        settings = {key: value for key, value in vars(options).items() if key not in ("output", "card", "run_code")}
        dtype = base.architecture.dtype
        content = {**settings, "dtype": dtype, "device": base.mesh.devices.flat[0].device_kind, **result.summary()}
        options.output.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if options.card:
        add_accuracy(options.card, options.task, result.accuracy, _reader(options))


def _check_card(options: argparse.Namespace) -> None:
    """Checks, before the work, that the card exists and that it is the evaluated module's or the base is evaluated."""
    if not read_manifest(options.card).training:
        raise PshareError(
            f"--card {options.card} has no model card, since its manifest has no training record; leave --card out."
        )
    if options.module != "base" and Path(options.module).resolve() != options.card.resolve():
        raise PshareError(f"--card {options.card} must be the folder of --module, {options.module}.")
    if options.module != "base" and 0 < options.sharing_ratio < 1:
        raise PshareError(
            "A model card reports accuracy with a sharing ratio of 1 or 0; set --sharing-ratio to 1 or 0, or leave --card out."
        )


def _reader(options: argparse.Namespace) -> Reader:
    if options.module == "base":
        return "base"
    return "module" if options.sharing_ratio else "alone"


def load_any_module(source: str, base: Model) -> DecodeModule:
    """The module of a folder, also of a full fine-tune that was not trained on the base's KV; "base" is the base itself."""
    if source == "base":
        return DecodeModule(base.architecture, base.params, base.mesh)
    return load_module(source, base, prefill="own")


def _shown(base: Model, module: DecodeModule, task: Task, options: argparse.Namespace) -> EvalResult:
    console = Console(stderr=True)
    columns = (TextColumn("Answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=len(task.items))
        results = evaluate(
            base,
            {options.task: module},
            task.items,
            task.verifier,
            max_new_tokens=options.max_new_tokens,
            sharing_ratio=options.sharing_ratio,
            rows=options.rows,
            progress=lambda done: bar.update(shown, completed=done),
        )
        return results[options.task]


if __name__ == "__main__":
    sys.exit(main())
