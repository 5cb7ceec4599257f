"""The command lines of training: `pshare-train --config FILE [a.b=c ...]` (also train/main.py) and `pshare-export --run FOLDER`.

Both end a user's mistake with one sentence and exit status 2. A stop by SIGTERM or Ctrl-C is a wanted end: status 0.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings, to_yaml
from pshare_jax.training import run_folder
from pshare_jax.training.config import TrainConfig, check_train_config
from pshare_jax.training.heap import return_freed_arrays


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains; the exit status is 0 at the end or after a wanted stop, and 2 after a user's mistake.

    Without `arguments` it is this process's command, and changes how the process frees memory (heap.py).
    """
    options = _train_parser().parse_intermixed_args(arguments)
    if arguments is None:
        return_freed_arrays()
    try:
        config = load_settings(TrainConfig, options.config, options.overrides)
        check_train_config(config)
        print(to_yaml(config), end="", flush=True)
        if options.dry_run:
            _dry_run(config, options.resume)
        elif not options.print_config:
            _train(config, options.resume)
    except PshareError as error:
        print(f"pshare-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the first step", flush=True)
    return 0


def export_main(arguments: Sequence[str] | None = None) -> int:
    """Writes a run's decode module; the exit status is 2 after a user's mistake."""
    options = _export_parser().parse_args(arguments)
    from pshare_jax.training.export import export

    try:
        folder = export(options.run, step=options.step, output=options.output, merge=options.merge, dtype=options.dtype)
    except PshareError as error:
        print(f"pshare-export: {error}", file=sys.stderr)
        return 2
    print(f"the decode module is in {folder}")
    return 0


def _train(config: TrainConfig, resume: bool) -> None:
    run_folder.claim(config, resume)
    # Loaded late: what is wrong with the config is told at once.
    from pshare_jax.training import run

    # While the base and the data are loaded, SIGTERM means what Ctrl-C means.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run.prepare_jax(config)
    run.train(config, resume=resume)


def _dry_run(config: TrainConfig, resume: bool) -> None:
    if resume:
        raise PshareError("--dry-run is of a whole run, from its start; leave --resume out.")
    from pshare_jax.training.plan.dry_run import dry_run

    dry_run(config)


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pshare-train", description="Train a decode module on a frozen base.")
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, such as configs/train/example.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and end")
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes, tokens, memory and time of the run and end; writes nothing"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last complete checkpoint in output")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="config values, such as optimizer.learning_rate=2e-5"
    )
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pshare-export", description="Write the decode module of a training run.")
    parser.add_argument("--run", required=True, type=Path, help="the run's folder (its config's output)")
    parser.add_argument(
        "--step", type=_step, help="a checkpoint's step, or best (lowest held-out loss); absent: the last"
    )
    parser.add_argument("--output", type=Path, help="the folder to write; absent: module or module-merged in the run's")
    parser.add_argument("--merge", action="store_true", help="merge LoRA into full weights")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the files; absent: what the run computed in"
    )
    return parser


def _step(text: str) -> int | Literal["best"]:
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor best")
    return int(text)
