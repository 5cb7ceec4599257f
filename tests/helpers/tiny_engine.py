"""Real engines over tiny models, stepped in turn, and their oracle: what `generate` gives for the same request."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

import pshare_jax as ps
from pshare_jax.engine.config import BatchConfig, EngineConfig, KVConfig, Placement, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Event, Request
from pshare_jax.engine.router import Route
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.share.generate import Rollout
from pshare_jax.text.tokenizer import Tokenizer

MIN_GAP = 1e-4


SPLIT, COLOCATED = placed([[0]], [[1]]), placed([[0]], [[0]])


class Engines:
    """A base with tasks, as an engine and as the plain loop."""

    def __init__(
        self,
        base: Any,
        tasks: Mapping[str, Any],
        placement: Placement = SPLIT,
        *,
        page_size: int = 4,
        pages: int = 64,
        chunk: int = 16,
        rows: int = 4,
        sharing: str = "shared",
        pipelined: bool = True,
        **config: Any,
    ):
        self.model = ps.load(base)
        self.sharing = sharing
        self.config = EngineConfig(
            tasks={name: str(source) for name, source in tasks.items()},
            placement=placement,
            sharing=sharing,  # type: ignore[arg-type]
            kv=KVConfig(page_size, pages),
            batch=BatchConfig(chunk, rows, pipelined),
            **config,
        )
        self.tokenizer: Tokenizer = self.model.tokenizer
        self._oracles: dict[str, ps.SharedModel] = {}
        self.engine = self.new_engine()
        self._names = itertools.count()

    def new_engine(self, **changes: Any) -> Engine:
        """A cold engine."""
        return Engine.build(self.model, dataclasses.replace(self.config, **changes))

    def oracle(self, task: str) -> ps.SharedModel:
        """The plain loop's factorised model for the task: in the isolated baseline prefill is its own weights too."""
        if task not in self._oracles:
            shared = ps.factorize(self.model)
            shared.add_task(task, self.config.tasks[task])
            if self.sharing == "isolated":
                module = shared.task_modules.module(task)
                own = dataclasses.replace(self.model, architecture=module.architecture, params=module.params)
                shared = ps.SharedModel(ps.PrefillModule(own), shared.task_modules)
            self._oracles[task] = shared
        return self._oracles[task]

    def expected(self, request: Request) -> Rollout:
        """What the plain loop gives."""
        return ps.rollout(
            self.oracle(request.task),
            request.task,
            request.prompt,
            max_new_tokens=request.max_tokens,
            sampling=request.sampling,
            stop_ids=request.stop_ids,
            min_tokens=request.min_tokens,
            response_start=request.response_start,
            grammar=request.grammar,
        )

    def request(self, task: str, prompt: Any, max_tokens: int = 6, **fields: Any) -> Request:
        """A request of its own name."""
        return Request(f"r{next(self._names)}", task, tuple(int(one) for one in prompt), max_tokens, **fields)

    def again(self, request: Request) -> Request:
        """The same request under a new name."""
        return dataclasses.replace(request, id=f"r{next(self._names)}")

    def clear(self, draw: np.random.Generator, task: str, length: int, max_tokens: int = 6, **fields: Any) -> Request:
        """A request with a random prompt and no near-tie in its answer."""
        for _ in range(50):
            prompt = draw.integers(0, self.model.config.vocab_size, length)
            request = self.request(task, prompt, max_tokens, **fields)
            if self.expected(request).smallest_gap >= MIN_GAP:
                return request
        raise AssertionError("every prompt has a near-tie")

    def run(self, *requests: Request, engine: Engine | None = None, steps: int = 20_000) -> list["Answer"]:
        """The engine's answers to requests that come at the same instant."""
        engine = engine or self.engine
        answers = [Answer(engine, request) for request in requests]
        for _ in range(steps):
            if all(answer.ended for answer in answers):
                break
            engine.step()
        settle(engine)
        return answers

    def check(self, *requests: Request, engine: Engine | None = None) -> list["Answer"]:
        """Every answer must be the oracle's, token by token."""
        answers = self.run(*requests, engine=engine)
        for request, answer in zip(requests, answers, strict=True):
            assert answer.error is None, answer.events[-1]
            expected = self.expected(request)
            assert expected.smallest_gap >= MIN_GAP
            assert answer.ids == expected.ids, (request.task, len(request.prompt))
        return answers


class Answer:
    """One request's events and the ids that its sequence has made."""

    def __init__(self, engine: Engine, request: Request, route: Route | None = None):
        self.events: list[Event] = []
        self.sequence = engine.submit(request, self.events.append, route).sequence

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].last

    @property
    def ids(self) -> list[int]:
        return self.sequence.decode.completion_ids

    @property
    def error(self) -> str | None:
        return self.events[-1].error if self.ended else "it has not ended"

    @property
    def cached_tokens(self) -> int:
        return self.sequence.cached_tokens


def settle(engine: Engine) -> None:
    """Steps an engine without requests until nothing is held, and proves its books."""
    for _ in range(200):
        if engine.idle:
            break
        engine.step()
    assert engine.idle
    engine.admission.check()


def prefill_tokens(engine: Engine) -> int:
    """Tokens fed to the prefill call so far."""
    return sum(worker.stats.tokens for worker in engine.prefill_workers)


SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=3)
