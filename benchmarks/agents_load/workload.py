"""Sessions of agents as token ids, known before the run: the same prompts go to every server.

Random tokens stand for what the tasks generate (their number is fixed), so contexts do not depend on the server.

- react: in every turn each task is called after the other. A call's prompt is the context and an instruction that is not
  kept; after it the context grows by the answer and the tool's output.
- reflexion: a turn is a trial, within which the context grows in the same way. Of a trial only the last task's answer is
  kept (the reflection): the next trial begins with the first context and all reflections.
- streams: as react, but each session calls one task alone, the tasks in turn over the sessions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.agents_load.config import WorkloadConfig


@dataclass(frozen=True)
class Call:
    """A call of a model: its prompt's token ids and the number of tokens to generate.

    It is sent `delay` seconds after the end of the session's call before, and not before `earliest` (seconds from the
    start of the run).
    """

    model: str
    prompt: tuple[int, ...]
    output: int
    delay: float = 0.0
    earliest: float = 0.0


@dataclass(frozen=True)
class Session:
    """Calls that are sent one after another; with arrivals, the first at `arrival` seconds from the start of the run."""

    name: str
    calls: tuple[Call, ...]
    arrival: float = 0.0


def make_sessions(config: WorkloadConfig, models: Sequence[str], seed: int) -> list[Session]:
    """The sessions that call `models`, without arrivals."""
    sessions = []
    for number in range(config.sessions):
        called = [models[number % len(models)]] if config.shape == "streams" else models
        calls = tuple(_calls(config, called, np.random.default_rng([seed, number])))
        sessions.append(Session(f"session-{seed}-{number}", (replace(calls[0], delay=0.0), *calls[1:])))
    return sessions


def _calls(config: WorkloadConfig, models: Sequence[str], draw: np.random.Generator) -> Iterator[Call]:
    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, config.vocab_size, count).tolist())

    context = start = tokens(config.context)
    for _ in range(config.turns):
        answer: tuple[int, ...] = ()
        for model in models:
            yield Call(model, context + tokens(config.instruction), config.output, config.tool_delay)
            answer = tokens(config.output)
            context = context + answer + tokens(config.tool_output)
        if config.shape == "reflexion":
            context = start = start + answer


def with_arrivals(sessions: Sequence[Session], rate: float, seed: int) -> list[Session]:
    """The sessions with Poisson arrivals, `rate` a second."""
    gaps = np.random.default_rng([seed, len(sessions)]).exponential(1 / rate, len(sessions))
    return [replace(session, arrival=float(at)) for session, at in zip(sessions, np.cumsum(gaps), strict=True)]
