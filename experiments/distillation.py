"""Distillation against supervised fine-tuning on one reasoning-gym task: a decode module on the base's KV learns the answers of
the data, or the distribution of a teacher that reads everything itself.

    python -m experiments.distillation [--config configs/train/chain_sum.yaml] [--json docs/distillation.json]

For each seed a teacher is trained (Full-FT), and with the same data, steps and optimizer a module by each objective of `MODELS`.
All answer the same held-out questions, the teacher on its own KV, the modules on the base's. Each accuracy is saved at once;
existing rows are kept, and an interrupted training resumes from its last checkpoint. At the end the figure is drawn beside the
JSON file. Run it from the repository's root.
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
from experiments.sharing_ratio import MAX_NEW_TOKENS, TRAIN, Rows
from pshare_jax.compilation_cache import cache_folder, keep_programs
from pshare_jax.evaluation.evaluate import evaluate, load_any_module
from pshare_jax.evaluation.intervals import accuracy, difference
from pshare_jax.evaluation.tasks import Task
from pshare_jax.settings import load_settings
from pshare_jax.share.model import Model, load
from pshare_jax.training.config import TrainConfig

TEACHER = "Full-FT, the teacher"
SFT = "SFT"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Trained:
    """A model to train by config overrides, in which {teacher} is the teacher of the same seed, and the share of the prompt whose
    KV is the base's.
    """

    name: str
    overrides: tuple[str, ...]
    ratio: float = 1.0


MODELS = (
    Trained(TEACHER, ("method=full_ft",), ratio=0.0),
    Trained(SFT, ("method=prefillshare",)),
    Trained("Distillation", ("method=prefillshare", "objective.name=distillation", "objective.teacher={teacher}")),
)


def main() -> None:
    """Computes the missing rows and prints the tables."""
    options = _options()
    keep_programs(cache_folder())
    config = load_settings(TrainConfig, options.config, options.overrides)
    setting = _setting(config, options.questions)
    rows = Rows(options.json, setting)
    runs = options.runs / hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:8]
    base = load(config.base, dtype=None if config.dtype == "auto" else config.dtype)
    with held_out(config, base, options.questions) as asked:
        for seed in SEEDS:
            if all(rows.has(model.name, seed, model.ratio) for model in MODELS):
                continue
            for model in MODELS:
                run = _run(runs, model, seed)
                # The teacher's weights are needed until the seed's last module is trained.
                if not rows.has(model.name, seed, model.ratio) or model.name == TEACHER:
                    _train(options, model, seed, runs)
                if not rows.has(model.name, seed, model.ratio):
                    rows.add(_answers(base, asked, model, seed, run / "module"))
                if model.name != TEACHER:
                    shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(_run(runs, MODELS[0], seed))
    print(markdown(rows.rows))
    draw(rows.rows, options.json.with_suffix(".png"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.distillation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", type=Path, default=Path("configs/train/chain_sum.yaml"), help="the train config")
    parser.add_argument("--json", type=Path, default=Path("docs/distillation.json"), help="file of the rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"), help="folder of trainings in progress")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config overrides of every training")
    return parser.parse_args()


def _setting(config: TrainConfig, num_questions: int) -> dict[str, Any]:
    """Everything that determines the rows, as read back from JSON."""
    setting = {
        "config": asdict(config),
        "models": [asdict(model) for model in MODELS],
        "questions": num_questions,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return json.loads(json.dumps(setting))


# --- rows ------------------------------------------------------------------------------------------------------------


def _run(runs: Path, model: Trained, seed: int) -> Path:
    return runs / f"{MODELS.index(model)}_{seed}"


def _train(options: argparse.Namespace, model: Trained, seed: int, runs: Path) -> None:
    """Trains in a separate process, which releases its memory; resumes an existing run."""
    run = _run(runs, model, seed)
    if (run / "module").exists():
        return
    teacher = _run(runs, MODELS[0], seed) / "module"
    own = [override.format(teacher=teacher) for override in model.overrides]
    settings = [*options.overrides, *own, f"seed={seed}", f"data.seed={seed}", f"output={run}"]
    command = [sys.executable, str(TRAIN), "--config", str(options.config), *settings]
    subprocess.run([*command, "--resume"] if run.exists() else command, check=True)
    if not (run / "module").exists():
        raise SystemExit(f"the training in {run} was stopped; run this again to resume it")


def _answers(base: Model, task: Task, model: Trained, seed: int, module: Path) -> dict[str, Any]:
    modules = {model.name: load_any_module(str(module), base)}
    options = {"max_new_tokens": MAX_NEW_TOKENS, "sharing_ratio": model.ratio}
    result = evaluate(base, modules, task.items, task.verifier, **options)[model.name]
    right = "".join(str(int(answer.score >= 1)) for answer in result.answers)
    print(f"{model.name}, seed {seed}: {result.accuracy:.1%}", flush=True)
    return {"model": model.name, "seed": seed, "ratio": model.ratio, "accuracy": result.accuracy, "right": right}


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line per model with the mean over seeds, its 95 % interval and each seed's accuracy; and the differences from SFT."""
    runs = _runs(rows)
    lines = ["| model | KV of the prompt | accuracy | 95 % interval | each seed |", "|---|---|---|---|---|"]
    for model in [model for model in MODELS if model.name in runs]:
        found, each = accuracy(runs[model.name]), ", ".join(f"{statistics.fmean(run):.1%}" for run in runs[model.name])
        lines.append(
            f"| {model.name} | {_kv_of(model)} | {found.estimate:.1%} | {found.low:.1%} to {found.high:.1%} | {each} |"
        )
    lines += ["", "| difference from SFT, points | | 95 % interval |", "|---|---|---|"]
    for name in [model.name for model in MODELS if model.name in runs and model.name != SFT and SFT in runs]:
        found = difference(runs[name], runs[SFT])
        lines.append(f"| {name} | {100 * found.estimate:+.1f} | {100 * found.low:+.1f} to {100 * found.high:+.1f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], picture: Path) -> None:
    """Draws each model's accuracy with its 95 % interval: dots are means over seeds, dashes single seeds."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    models = [model for model in MODELS if model.name in _runs(rows)]
    for place, model in enumerate(models):
        runs = _runs(rows)[model.name]
        mean, low, high = (100 * value for value in accuracy(runs))
        axes.errorbar([place], [mean], [[mean - low], [high - mean]], fmt="o", capsize=6, color=f"C{place}")
        each = [100 * statistics.fmean(run) for run in runs]
        axes.plot([place] * len(each), each, "_", color="black", markersize=9)
        axes.annotate(f"{mean:.1f}", (place, mean), (8, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(models)), [f"{model.name}\non {_kv_of(model)} KV" for model in models])
    axes.margins(x=0.25)
    axes.set_ylabel(f"right answers of {len(rows[0]['right'])}, %")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(picture, dpi=150)


def _runs(rows: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Each model's scores `[seeds][items]`."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append([float(right) for right in row["right"]])
    return found


def _kv_of(model: Trained) -> str:
    return "the base's" if model.ratio else "its own"


if __name__ == "__main__":
    main()
