"""A task as a YAML file: which questions a data file asks, and the verifier of their answers. Host code without jax."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least, load_settings
from pshare_jax.training.data.config import DataConfig, ShapeName, SourceConfig
from pshare_jax.training.data.unread import EVERY

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskConfig:
    """`path`, `shape`, `columns` and `format` are those of training data. `verifier` compares answers as a whole (exact), by
    their number, by the `pattern` of a regular expression, or runs them as programs of at most `cpu_seconds` (code).
    """

    path: str | list[str]
    shape: ShapeName | None = None
    columns: dict[str, str] = field(default_factory=dict)
    format: Literal["chat", "text"] | None = None
    verifier: Literal["exact", "number", "regex", "code"] = "exact"
    pattern: str | None = None
    cpu_seconds: int = 3

    @property
    def source(self) -> SourceConfig:
        """The data."""
        return SourceConfig(self.path, shape=self.shape, columns=self.columns, ignore=[EVERY])

    def data(self, max_len: int) -> DataConfig:
        """The data as training would read them."""
        return DataConfig([self.source], format=self.format, max_len=max_len)


def read_task(name: str) -> TaskConfig:
    """The task of a YAML file; any other name is a data file or glob, whose answers are compared as a whole.

    Raises:
        PshareError: the file cannot be read, or its settings are wrong.
    """
    if not name.endswith(SUFFIXES):
        return TaskConfig(name)
    config = load_settings(TaskConfig, Path(name))
    check_least([("cpu_seconds", config.cpu_seconds, 1)])
    if (config.verifier == "regex") != (config.pattern is not None):
        raise PshareError(f"{name}: verifier: regex needs a pattern, and no other verifier has one.")
    return config
