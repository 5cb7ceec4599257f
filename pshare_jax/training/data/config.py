"""What a training config may say about its data; `prepare.py` and `pipeline.py` read it. Imports no jax."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class SourceConfig:
    """One source: `path` is a file, a glob, a list of these, `reasoning_gym:<task>?seed=1&size=1000`, or
    `bfcl:<category>`.

    `weight` is how often an epoch goes over it: 1 uses every sample once, 2 twice, 0.5 a half of them (the other half
    in the next epoch).
    """

    path: str | list[str]
    weight: float = 1.0


@dataclass(frozen=True)
class RowsConfig:
    """The one shape of all batches: rows, and what each holds, context tokens and answer tokens of several samples.

    Absent lengths are chosen from the data so that little is padding.
    """

    rows: int = 4
    context_len: int | None = None
    answer_len: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """Sources, how they are read, split and put into batches.

    `format`: `chat` renders records with the model's chat template, `text` trains the completion right after the
    prompt's own text; absent: chat if the model has a template. Answers that would end beyond `max_len` tokens are left
    out. Without `epochs` training never runs out of data. For evaluation `eval_fraction` of the records are kept out of
    training, or `eval_sources` are read. `num_workers` processes build the batches (0: none).
    """

    sources: list[SourceConfig]
    format: Literal["chat", "text"] | None = None
    max_len: int = 1024
    batch: RowsConfig = field(default_factory=RowsConfig)
    epochs: int | None = 1
    seed: int = 0
    eval_fraction: float = 0.0
    eval_sources: list[SourceConfig] = field(default_factory=list)
    num_workers: int = 0


def check_data(config: DataConfig, key: str = "data") -> None:
    """Checks the values; `key` is the config's place in the whole one.

    Raises:
        PshareError: naming the key and the way out.
    """
    if not config.sources:
        raise PshareError(f"{key}.sources is empty; name at least one, such as [{{path: data.jsonl}}].")
    for name, sources in (("sources", config.sources), ("eval_sources", config.eval_sources)):
        for index, source in enumerate(sources):
            _check_source(f"{key}.{name}.{index}", source)
    check_least((f"{key}.{name}", value, least) for name, value, least in _least_values(config))
    if config.seed > MAX_SEED:
        raise PshareError(f"{key}.seed must be at most {MAX_SEED}, not {config.seed}.")
    if not 0 <= config.eval_fraction < 1:
        raise PshareError(f"{key}.eval_fraction must be at least 0 and less than 1, not {config.eval_fraction}.")
    if config.eval_fraction and config.eval_sources:
        raise PshareError(f"{key}.eval_fraction and {key}.eval_sources are two ways to the same; give one of them.")


def paths_of(source: SourceConfig) -> list[str]:
    """The source's paths as a list."""
    return [source.path] if isinstance(source.path, str) else source.path


def _check_source(key: str, source: SourceConfig) -> None:
    if not all(paths_of(source)) or not paths_of(source):
        raise PshareError(f"{key}.path is empty; name a file, a glob, reasoning_gym:<task> or bfcl:<category>.")
    if not 0 < source.weight < math.inf:
        raise PshareError(f"{key}.weight must be more than 0 and finite, not {source.weight}.")


def _least_values(config: DataConfig) -> list[tuple[str, int | None, int]]:
    return [
        # One prompt token, one answer token and the end of the turn.
        ("max_len", config.max_len, 3),
        ("batch.rows", config.batch.rows, 1),
        ("batch.context_len", config.batch.context_len, 1),
        ("batch.answer_len", config.batch.answer_len, 1),
        ("epochs", config.epochs, 1),
        ("seed", config.seed, 0),
        ("num_workers", config.num_workers, 0),
    ]
