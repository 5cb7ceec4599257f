"""The commands `pshare-train --config FILE [a.b=c ...]` (also train/main.py) and `pshare-export --run FOLDER`.

A user error ends with one sentence and exit status 2, a stop by SIGTERM or Ctrl-C with status 0. Starts without JAX.
"""

import argparse
import ctypes
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings, to_yaml
from pshare_jax.training import run_folder
from pshare_jax.training.config import TrainConfig, check_train_config

MMAP_THRESHOLD = 1 << 20
"""Bytes from which glibc maps an allocation by itself and unmaps it when it is freed."""
_M_MMAP_THRESHOLD = -3
"""mallopt's parameter number in malloc.h. Setting it also stops glibc from raising the threshold."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and returns the exit status. Without `arguments`, as a command, it sets malloc options."""
    options = _train_parser().parse_intermixed_args(arguments)
    if arguments is None:
        unmap_freed_arrays()
    try:
        config = load_settings(TrainConfig, options.config, options.overrides)
        check_train_config(config)
        print(to_yaml(config), end="", flush=True)
        if options.dry_run:
            _dry_run(config, options.resume)
        elif not options.print_config:
            _sweep(config, options.resume) if config.sweep else _train(config, options.resume)
    except PshareError as error:
        print(f"pshare-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the first step", flush=True)
    return 0


def export_main(arguments: Sequence[str] | None = None) -> int:
    """Writes a run's decode module, pushes it if that is asked for, and returns the exit status."""
    options = _export_parser().parse_args(arguments)
    from pshare_jax.training import push
    from pshare_jax.training.result import export

    try:
        if options.push is not None:
            push.check_name(options.push)
        elif options.private:
            raise PshareError("--private says how --push creates a model; give --push ORG/MODEL, or omit --private.")
        folder = export(options.run, step=options.step, output=options.output, merge=options.merge, dtype=options.dtype)
        print(f"the decode module is in {folder}", flush=True)
        if options.push is not None:
            print(f"pushed to {push.push(folder, options.push, private=options.private)}")
    except PshareError as error:
        print(f"pshare-export: {error}", file=sys.stderr)
        return 2
    return 0


def unmap_freed_arrays() -> None:
    """Makes glibc return freed arrays to the system, for the whole process; no effect with another C library.

    By default glibc keeps freed blocks of up to 32 MiB. Weights, gradients and moments are such blocks; with smaller
    blocks between them the next step's arrays do not fit, and gigabytes stay unused.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)


def _train(config: TrainConfig, resume: bool) -> None:
    # Checked before JAX is imported, so that errors appear at once.
    run_folder.claim(config, resume)
    from pshare_jax.training import run

    _prepare(config)
    run.train(config, resume=resume)


def _sweep(config: TrainConfig, resume: bool) -> None:
    from pshare_jax.training import sweep

    sweep.claim(config, resume)
    _prepare(config)
    sweep.sweep(config, resume=resume)


def _prepare(config: TrainConfig) -> None:
    from pshare_jax.training import run

    # Until training begins, SIGTERM acts like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run.prepare_jax(config)


def _dry_run(config: TrainConfig, resume: bool) -> None:
    if config.sweep:
        raise PshareError("--dry-run describes one run; leave out sweep.")
    if resume:
        raise PshareError("--dry-run describes a whole run from its start; omit --resume.")
    from pshare_jax.training.plan.dry_run import dry_run

    dry_run(config)


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pshare-train", description="Train a decode module on a frozen base.")
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, such as configs/train/example.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print model size, tokens, memory and time of the run and exit; writes only prepared data",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in output")
    parser.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help="config overrides, such as optimizer.learning_rate=2e-5"
    )
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pshare-export", description="Write the decode module of a training run.")
    parser.add_argument("--run", required=True, type=Path, help="the run folder (output in its config)")
    parser.add_argument(
        "--step", type=_step, help="step of the checkpoint, or best (lowest held-out loss); default: the last"
    )
    parser.add_argument(
        "--output", type=Path, help="the folder to write; default: module or module-merged in the run folder"
    )
    parser.add_argument("--merge", action="store_true", help="merge LoRA into full weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the files; default: the run's")
    parser.add_argument("--push", metavar="ORG/MODEL", help="then upload the folder to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push: the model is private")
    return parser


def _step(text: str) -> int | Literal["best"]:
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a step; give a number or best")
    return int(text)
