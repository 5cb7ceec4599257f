"""The accuracy cost of sharing a prefill: full fine-tuning, naive sharing, and PrefillShare, on one reasoning-gym task.

    python -m experiments.sharing_ratio [--config configs/train/chain_sum.yaml] [--json docs/sharing.json]

Trains every model of `MODELS` with the config's data, steps and optimizer, and asks all of them the same held-out
questions at several sharing ratios (fraction of the prompt with base KV). Each accuracy is saved at once; existing rows
are kept, and an interrupted training resumes from its last checkpoint. Run it from the repository's root.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.held_out import held_out
from pshare_jax.compilation_cache import cache_folder, keep_programs
from pshare_jax.evaluation.evaluate import evaluate, load_any_module
from pshare_jax.evaluation.intervals import Interval, accuracy, difference
from pshare_jax.evaluation.tasks import Task
from pshare_jax.settings import load_settings
from pshare_jax.share.model import Model, load
from pshare_jax.training.config import Method, TrainConfig

NUM_QUESTIONS = 500
MAX_NEW_TOKENS = 16
TRAIN = Path("train/main.py")


@dataclass(frozen=True)
class Trained:
    """A model to train, and its sharing ratios. `overrides` are config overrides for every seed."""

    name: str
    method: Method
    ratios: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: tuple[str, ...] = ()


FULL_FT = Trained("Full-FT", "full_ft", (0.0, 0.25, 0.5, 0.75, 1.0))
SHARED = Trained("PrefillShare full", "prefillshare", (1.0, 0.0))
# Adapters need a larger learning rate than full weights.
LORA = Trained(
    "PrefillShare LoRA",
    "prefillshare",
    (1.0, 0.0),
    seeds=(0,),
    overrides=("module.kind=lora", "module.rank=16", "module.alpha=32", "optimizer.learning_rate=1e-3"),
)
COMPARED = (
    ((SHARED.name, 1.0), (FULL_FT.name, 0.0)),
    ((FULL_FT.name, 1.0), (FULL_FT.name, 0.0)),
    ((FULL_FT.name, 0.75), (FULL_FT.name, 0.0)),
    ((SHARED.name, 0.0), (SHARED.name, 1.0)),
    ((LORA.name, 1.0), (SHARED.name, 1.0)),
)
"""What is compared: (model, ratio) with (model, ratio)."""
# Ordered by seed, so that an interrupted experiment has every model.
MODELS = [(model, seed) for seed in (0, 1, 2) for model in (SHARED, FULL_FT, LORA) if seed in model.seeds]


class Rows:
    """The accuracies so far, a row per (model, seed, ratio), in a JSON file."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self._path, self._setting = path, setting
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            content = json.loads(path.read_text())
            if content["setting"] != setting:
                raise SystemExit(f"{path} has rows of another setting; give another --json, or remove it.")
            self.rows = content["rows"]

    def has(self, model: str, seed: int | None, ratio: float) -> bool:
        """Whether the row exists."""
        return any((row["model"], row["seed"], row["ratio"]) == (model, seed, ratio) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes the file."""
        self.rows.append(row)
        part = self._path.with_suffix(".part")
        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        part.write_text(f'{{"setting": {json.dumps(self._setting)},\n "rows": [\n  {lines}\n]}}\n')
        part.replace(self._path)


def main() -> None:
    """Computes the missing rows, prints the table and draws the figure."""
    options = _options()
    keep_programs(cache_folder())
    config = load_settings(TrainConfig, options.config, [])
    setting = _setting(config)
    rows = Rows(options.json, setting)
    runs = options.runs / hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
    base = load(config.base, dtype=None if config.dtype == "auto" else config.dtype)
    with held_out(config, base, NUM_QUESTIONS) as asked:
        _answer(rows, base, asked, "base", None, "base", (1.0,))
        for model, seed in MODELS:
            if all(rows.has(model.name, seed, ratio) for ratio in model.ratios):
                continue
            run = runs / f"{model.name.replace(' ', '_')}_{seed}"
            _train(options.config, model, seed, run)
            _answer(rows, base, asked, model.name, seed, str(run / "module"), model.ratios)
            shutil.rmtree(run)
    print(markdown(rows.rows))
    draw(rows.rows, options.json.with_suffix(".png"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sharing_ratio", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", type=Path, default=Path("configs/train/chain_sum.yaml"), help="the train config")
    parser.add_argument(
        "--json", type=Path, default=Path("docs/sharing.json"), help="file of the rows; the figure is written beside it"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/sharing"), help="folder of trainings in progress")
    return parser.parse_args()


# --- the task --------------------------------------------------------------------------------------------------------


def _setting(config: TrainConfig) -> dict[str, Any]:
    """Everything that determines the rows, as read back from JSON; a file has rows of one setting only."""
    setting = {
        "config": asdict(config),
        "models": [asdict(model) for model in (FULL_FT, SHARED, LORA)],
        "questions": NUM_QUESTIONS,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return json.loads(json.dumps(setting))


# --- rows ------------------------------------------------------------------------------------------------------------


def _train(config: Path, model: Trained, seed: int, run: Path) -> None:
    """Trains in a separate process, which releases its memory; resumes an existing run."""
    if (run / "module").exists():
        return
    settings = (f"method={model.method}", *model.overrides, f"seed={seed}", f"data.seed={seed}", f"output={run}")
    command = [sys.executable, str(TRAIN), "--config", str(config), *settings]
    subprocess.run([*command, "--resume"] if run.exists() else command, check=True)
    if not (run / "module").exists():
        raise SystemExit(f"the training in {run} was stopped; run this again to resume it")


def _answer(
    rows: Rows, base: Model, task: Task, name: str, seed: int | None, module: str, ratios: tuple[float, ...]
) -> None:
    missing = [ratio for ratio in ratios if not rows.has(name, seed, ratio)]
    modules = {name: load_any_module(module, base)} if missing else {}
    for ratio in missing:
        results = evaluate(base, modules, task.items, task.verifier, max_new_tokens=MAX_NEW_TOKENS, sharing_ratio=ratio)
        result = results[name]
        right = "".join(str(int(answer.score >= 1)) for answer in result.answers)
        cut = sum(answer.cut for answer in result.answers)
        rows.add({"model": name, "seed": seed, "ratio": ratio, "accuracy": result.accuracy, "cut": cut, "right": right})
        print(f"{name}, seed {seed}, ratio {ratio:g}: {result.accuracy:.1%}", flush=True)


# --- table and figure ------------------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tables: a line per model and ratio, with the mean over seeds, its 95 % interval, and each seed's accuracy; and the
    differences that the experiment is for.
    """
    lines = ["| model | KV of the prompt | accuracy | 95 % interval | each seed |", "|---|---|---|---|---|"]
    for (model, ratio), runs in _runs(rows).items():
        found, each = accuracy(runs), ", ".join(f"{statistics.fmean(run):.1%}" for run in runs)
        among = "" if len(runs) > 1 else ", of this module"
        lines.append(f"| {model} | {_kv_of_prompt(ratio)} | {found.estimate:.1%} | {_ends(found)}{among} | {each} |")
    lines += ["", "| difference, points | | 95 % interval |", "|---|---|---|"]
    runs = _runs(rows)
    for (ours, our_ratio), (theirs, their_ratio) in COMPARED:
        if (ours, our_ratio) in runs and (theirs, their_ratio) in runs:
            found = difference(runs[ours, our_ratio], runs[theirs, their_ratio], same_trainings=ours == theirs)
            named = f"{ours} on {_kv_of_prompt(our_ratio)} KV - {theirs} on {_kv_of_prompt(their_ratio)} KV"
            single = min(len(runs[ours, our_ratio]), len(runs[theirs, their_ratio])) == 1
            ends = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}" + (", of this module" if single else "")
            lines.append(f"| {named} | {100 * found.estimate:+.1f} | {ends} |")
    return "\n".join(lines)


def _ends(interval: Interval) -> str:
    return f"{interval.low:.1%} to {interval.high:.1%}"


def _runs(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[list[float]]]:
    """(model, ratio) -> for each seed, whether it answered each question right."""
    groups: dict[tuple[str, float], list[list[float]]] = {}
    for row in rows:
        groups.setdefault((row["model"], float(row["ratio"])), []).append([float(right) for right in row["right"]])
    return groups


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Draws accuracy over the sharing ratio for all models: dots are means over seeds, dashes single seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, model in enumerate((FULL_FT.name, SHARED.name, LORA.name, "base")):
        points = sorted(
            (ratio, list(map(statistics.fmean, runs))) for (name, ratio), runs in _runs(rows).items() if name == model
        )
        if not points:
            continue
        ratios = [ratio for ratio, _ in points]
        means = [100 * statistics.fmean(each) for _, each in points]
        axes.plot(ratios, means, "o-" if model == FULL_FT.name else "o", color=f"C{index}", label=model)
        for ratio, each in points:
            axes.plot([ratio] * len(each), [100 * accuracy for accuracy in each], "_", color=f"C{index}", markersize=9)
    axes.set_xlabel("sharing ratio: share of the prompt whose KV is the base's")
    axes.set_ylabel(f"right answers of {NUM_QUESTIONS}, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)


def _kv_of_prompt(ratio: float) -> str:
    return "the base's" if ratio == 1 else f"{ratio:.0%} the base's" if ratio else "its own"


if __name__ == "__main__":
    main()
