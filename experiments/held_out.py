"""Held-out questions of the reasoning-gym task of a train config."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from pshare_jax.evaluation.tasks import Item, Task, open_task
from pshare_jax.share.model import Model
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.config import paths_of
from pshare_jax.training.data.overlap import normalised
from pshare_jax.training.data.sources import open_reasoning_gym

# reasoning-gym draws item i from seed + i, so this seed must be far from any training seed.
SEED = 1_000_000
# Items drawn per question: training questions and duplicates are discarded.
DRAWS_PER_QUESTION = 4


def training_task(config: TrainConfig) -> str:
    """The path of the config's only source."""
    (source,) = config.data.sources
    (path,) = paths_of(source)
    return path


@contextlib.contextmanager
def held_out(config: TrainConfig, base: Model, count: int) -> Iterator[Task]:
    """`count` different questions of the config's task that its training data do not ask, by the rule of overlap.py."""
    name, _, query = training_task(config).partition("?")
    own = [part for part in query.split("&") if not part.startswith(("seed=", "size="))]
    drawn = f"{name}?{'&'.join([f'seed={SEED}', f'size={count * DRAWS_PER_QUESTION}', *own])}"
    with open_task(drawn, base) as task:
        yield replace(task, items=_unseen(task.items, config, count))


def _unseen(items: list[Item], config: TrainConfig, count: int) -> list[Item]:
    trained = open_reasoning_gym(training_task(config))
    seen = {normalised(trained[index]["question"]) for index in range(len(trained))}
    unseen = {mark: item for item in items if (mark := normalised(item.record["question"])) not in seen}
    if len(unseen) < count:
        raise SystemExit(f"the task has only {len(unseen)} questions outside the training data, but {count} are needed")
    return list(unseen.values())[:count]
