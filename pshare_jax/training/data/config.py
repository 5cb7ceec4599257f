"""The data section of a train config and its checks; `prepare.py` and `loader.py` read it."""

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least

MAX_SEED = 2**32 - 1
ShapeName = Literal[
    "alpaca",
    "dolly",
    "sharegpt",
    "xlam",
    "metamath",
    "openorca",
    "question_answer",
    "prompt_response",
    "input_output",
    "preference",
]


@dataclass(frozen=True)
class SourceConfig:
    """A source. `path` is a file, a glob, `hf:org/name[/config]?split=train[&revision=...]`,
    `reasoning_gym:<task>?seed=1&size=1000`, `bfcl:<category>`, the same without what another category asks as
    `bfcl:<category>?without=bfcl:<other>`, or a list. `shape` is that of its records if they have neither messages nor prompt
    and completion (shapes.py); `columns` maps such a field to the name that it has in the source. Fields in `ignore` may be
    without effect (unread.py); "*" stands for all.

    `weight` is the number of passes over the source in an epoch: 1 uses every sample once, 2 twice, 0.5 half of them
    (and the other half in the next epoch).
    """

    path: str | list[str]
    weight: float = 1.0
    shape: ShapeName | None = None
    columns: dict[str, str] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RowsConfig:
    """The shape of all batches: number of rows, and context and answer tokens of a row, which packs several samples.

    Lengths of None are chosen from the data to keep padding small.
    """

    rows: int = 4
    context_len: int | None = None
    answer_len: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """The sources and how they are read, split and batched.

    `format`: `chat` renders records with the model's chat template, `text` appends the completion to the prompt's text;
    None: chat if the model has a template. Answers that would end after `max_len` tokens are omitted. `epochs` None
    repeats the data without end. Evaluation data are `eval_fraction` of the records, held out from training, or
    `eval_sources`. `clock` is the time that a chat template with a date tells (ISO 8601; None: the start of the run, which
    its config.yaml keeps). `num_workers` processes build the batches (0: the training process does).
    """

    sources: list[SourceConfig]
    format: Literal["chat", "text"] | None = None
    max_len: int = 1024
    batch: RowsConfig = field(default_factory=RowsConfig)
    epochs: int | None = 1
    seed: int = 0
    eval_fraction: float = 0.0
    eval_sources: list[SourceConfig] = field(default_factory=list)
    clock: str | None = None
    num_workers: int = 0

    @property
    def time(self) -> datetime | None:
        """The clock's time."""
        return None if self.clock is None else datetime.fromisoformat(self.clock)

    @property
    def has_evaluation(self) -> bool:
        """Whether some data are for evaluation."""
        return bool(self.eval_fraction or self.eval_sources)


def check_data(config: DataConfig, key: str = "data") -> None:
    """Checks the values; `key` is the key of this section.

    Raises:
        PshareError: a wrong value; the message has the key and the allowed values.
    """
    if not config.sources:
        raise PshareError(f"{key}.sources must not be empty; give at least one source, such as [{{path: data.jsonl}}].")
    for name, sources in (("sources", config.sources), ("eval_sources", config.eval_sources)):
        for index, source in enumerate(sources):
            _check_source(f"{key}.{name}.{index}", source)
    check_least((f"{key}.{name}", value, least) for name, value, least in _least_values(config))
    if config.seed > MAX_SEED:
        raise PshareError(f"{key}.seed must be at most {MAX_SEED}, not {config.seed}.")
    try:
        _ = config.time
    except ValueError:
        raise PshareError(f"{key}.clock must be a time as 2026-01-31T12:00:00, not {config.clock!r}.") from None
    if not 0 <= config.eval_fraction < 1:
        raise PshareError(f"{key}.eval_fraction must be at least 0 and less than 1, not {config.eval_fraction}.")
    if config.eval_fraction and config.eval_sources:
        raise PshareError(f"{key}.eval_fraction and {key}.eval_sources exclude each other; set only one of them.")


def paths_of(source: SourceConfig) -> list[str]:
    """The source's paths as a list."""
    return [source.path] if isinstance(source.path, str) else source.path


def _check_source(key: str, source: SourceConfig) -> None:
    if not all(paths_of(source)) or not paths_of(source):
        raise PshareError(
            f"{key}.path must not be empty; give a file, a glob, hf:org/name?split=train, reasoning_gym:<task> or "
            "bfcl:<category>."
        )
    if not 0 < source.weight < math.inf:
        raise PshareError(f"{key}.weight must be positive and finite, not {source.weight}.")


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
