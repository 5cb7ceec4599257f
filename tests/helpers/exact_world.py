"""What the exactness tests (test_exact_*.py) share: small models of every family with three tasks, and one oracle each.

Two or three layers notice any wrong page (test_exact_matrix.py proves it) and compile fast: nearly all the time of these tests is
compilation. Oracle results are kept for each (sharing, task, prompt), whichever engine asks.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny import VOCAB, tiny_folder, tiny_module
from tiny_engine import COLOCATED, MIN_GAP, SPLIT, Answer, Engines, prefill_tokens, settle

from pshare_jax.engine.config import Placement
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Request
from pshare_jax.share.factorize import SharedModel
from pshare_jax.share.generate import Rollout, continue_from

TASKS = ("chat", "math", "tools")
"""The base itself, full weights, a LoRA adapter."""
SHARINGS = ("shared", "isolated")
ANSWER = 6
"""Tokens of an answer."""
LONG = 50
"""Tokens of a world's longest prompt: more than one chunk, and three pages of any size."""
LONG_NUMBERS = {"llama": 0, "qwen3": 0, "gemma3": 2}
"""Which long prompt: one of which every page is noticed (test_exact_matrix.py)."""
LOGPROB_TOLERANCE = 1e-4
CAPACITY = 64
"""Tokens of prompt and answer that all shorter ones are filled up to in the oracle."""
PAGES = {1: 1600, 4: 400, 16: 102}
"""Page size -> pages of a pool: never too few, and a third of them (isolated) still holds the model's whole context, so
that page tables have one length."""
PLACEMENTS = {"split": SPLIT, "colocated": COLOCATED}

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    # kv heads that are sharded on every mesh, and one that is whole on every mesh.
    "qwen3": {"num_key_value_heads": 4},
    "gemma3": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
}


def edges(page_size: int) -> list[int]:
    """Prompt lengths around one and two pages."""
    near = (page_size - 1, page_size, page_size + 1, 2 * page_size - 1, 2 * page_size, 2 * page_size + 1)
    return sorted({length for length in near if length > 0})


def full_len(length: int, page_size: int) -> int:
    """Tokens of a prompt that lie in pages which the base fills: what a warm request finds cached."""
    return (length - 1) // page_size * page_size


class World:
    """A base and its tasks on disk, and what the plain loop says about them."""

    def __init__(self, family: str, folder: Path, **changes: Any):
        self.base = tiny_folder(family, folder / "base", **{**SHAPES[family], **changes})
        self.tasks = {
            "chat": "base",
            "math": tiny_module(self.base, folder / "math"),
            "tools": tiny_module(self.base, folder / "tools", kind="lora"),
        }
        self.rollouts: dict[tuple[str, Request], Rollout] = {}
        self.loops = {sharing: WorldEngines(self, SPLIT, sharing=sharing) for sharing in SHARINGS}
        self.prompt = functools.cache(self._prompt)
        self.long_number = LONG_NUMBERS[family]

    def engines(self, placement: Placement = SPLIT, *, page_size: int = 4, **plan: Any) -> "WorldEngines":
        """Engines whose oracle is the world's; by default with pages that are filled with NaN when they are freed."""
        defaults = {"debug": True, "rows": 2, "pages": PAGES[page_size]}
        return WorldEngines(self, placement, page_size=page_size, **{**defaults, **plan})

    @property
    def long(self) -> tuple[int, ...]:
        """The prompt of which every page is noticed."""
        return self.prompt(LONG, self.long_number)

    def _prompt(self, length: int, number: int = 0) -> tuple[int, ...]:
        """One of the world's prompts of a length. Shared and isolated, the tasks' answers differ within three tokens and
        no token is a near-tie.
        """
        draw = np.random.default_rng((length, number))
        for _ in range(50):
            prompt = tuple(draw.integers(0, VOCAB, length).tolist())
            if all(self._clear(loop, prompt) for loop in self.loops.values()):
                return prompt
        raise AssertionError("every prompt has a near-tie, or the tasks are too much alike")

    def _clear(self, loop: "WorldEngines", prompt: tuple[int, ...]) -> bool:
        answers = [loop.expected(loop.request(task, prompt)) for task in TASKS]
        differ = len({tuple(answer.ids[:3]) for answer in answers}) == len(TASKS)
        return differ and all(answer.smallest_gap >= MIN_GAP for answer in answers)


class WorldEngines(Engines):
    """An engine over a world's tasks."""

    def __init__(self, world: World, placement: Placement, **plan: Any):
        super().__init__(world.base, world.tasks, placement, **plan)
        self._world = world

    def expected(self, request: Request) -> Rollout:
        """What the plain loop gives, asked once."""
        key = (
            self.sharing,
            dataclasses.replace(request, id="", logprobs=None, scores_prompt=False, cache_salt="", session=None),
        )
        if key not in self._world.rollouts:
            self._world.rollouts[key] = rollout(self._world.loops[self.sharing].oracle(request.task), request)
        return self._world.rollouts[key]

    def some(
        self, length: int, tasks: Sequence[str] = TASKS, max_tokens: int = ANSWER, first: int = 0, **fields: Any
    ) -> list[Request]:
        """The first of the world's prompts of a length without a near-tie, as a request for each task."""
        for number in range(first, first + 50):
            prompt = self._world.prompt(length, number)
            made = [self.request(task, prompt, max_tokens, **fields) for task in tasks]
            if all(self.expected(request).smallest_gap >= MIN_GAP for request in made):
                return made
        raise AssertionError("every prompt has a near-tie")

    def turn(self, task: str, before: Sequence[int], max_tokens: int = ANSWER, **fields: Any) -> Request:
        """A request with a given beginning and one token more, without a near-tie in its answer."""
        for last in range(VOCAB):
            request = self.request(task, (*before, last), max_tokens, **fields)
            if self.expected(request).smallest_gap >= MIN_GAP:
                return request
        raise AssertionError("every token leads to a near-tie")

    def check(self, *requests: Request, engine: Engine | None = None) -> list[Answer]:
        """Every answer must be the oracle's, token by token and, where they were asked for, in its logprobs."""
        answers = super().check(*requests, engine=engine)
        self._check_logprobs(answers)
        return answers

    def check_one_by_one(self, requests: Sequence[Request], steps: Iterable[int]) -> list[Answer]:
        """The same for requests that come so many engine steps after each other."""
        answers = []
        for request, num_steps in zip(requests, steps, strict=False):
            answers.append(Answer(self.engine, request))
            for _ in range(num_steps):
                self.engine.step()
        finish(self.engine, answers)
        for request, answer in zip(requests, answers, strict=True):
            assert answer.error is None, answer.events[-1]
            assert self.expected(request).smallest_gap >= MIN_GAP
            assert answer.ids == self.expected(request).ids, (request.task, len(request.prompt))
        self._check_logprobs(answers)
        return answers

    def _check_logprobs(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            request = answer.sequence.request
            if request.logprobs is not None:
                assert np.abs(np.array(logprobs(answer)) - self.expected(request).logprobs).max() < LOGPROB_TOLERANCE


def logprobs(answer: Answer) -> list[float]:
    """Of the answer's tokens, which must come with them."""
    reported = [event.logprobs for event in answer.events if not event.prompt_logprobs]
    assert [one and one.token_id for one in reported] == answer.ids
    return [one.logprob for one in reported if one is not None]


def rollout(shared: SharedModel, request: Request) -> Rollout:
    """`ps.rollout` with all shorter contexts filled up to one length, behind their end, so that few shapes are compiled."""
    context = [*request.prompt[:-1]]
    num_base = shared.split(request.task, request.prompt, request.response_start).base_len
    padding = [0] * (CAPACITY - 1 - num_base)
    kv = shared.prefill([context[:num_base] + padding])
    kv = shared.transfer(dataclasses.replace(kv, length=num_base))
    if num_base < len(context):
        kv = shared.decode(request.task, [context[num_base:]], kv)[1]
    return continue_from(
        shared,
        request.task,
        kv,
        request.prompt[-1],
        request.max_tokens,
        request.sampling,
        request.stop_ids,
        min_tokens=request.min_tokens,
        context_ids=context,
        grammar=request.grammar,
        begun=request.prompt[request.response_start :] if request.response_start is not None else (),
    )


def finish(engine: Engine, answers: Sequence[Answer]) -> None:
    """Steps until every answer has ended, and proves the books."""
    for _ in range(20_000):
        if all(answer.ended for answer in answers):
            break
        engine.step()
    settle(engine)


def preempted(engines: Engines, *requests: Request) -> list[Answer]:
    """The answers of requests that together need more than eight pages, of a decode worker that has no more: one is preempted."""
    [worker] = engines.engine.decode_workers
    before, manager = worker.num_preempted, worker.pool.manager
    taken = manager.allocate(worker.pool.num_usable - 8, "nobody")
    assert taken is not None
    answers = [Answer(engines.engine, request) for request in requests]
    while not all(answer.ended for answer in answers):
        engines.engine.step()
    manager.release(taken, "nobody")
    settle(engines.engine)
    assert worker.num_preempted > before
    return answers


def assert_prefilled_once(engine: Engine, answers: Sequence[Answer]) -> None:
    """Tokens fed to the prefill call = those of all prompts but the last ones and the cached ones (design.md)."""
    assert not engine.admission.num_restarts
    assert not any(worker.num_preempted for worker in engine.decode_workers)
    prompts = sum(len(answer.sequence.request.prompt) - 1 - answer.cached_tokens for answer in answers)
    assert prefill_tokens(engine) == prompts


def digest(params: Any) -> str:
    """A hash of parameters, to the last bit."""
    data = hashlib.sha256()
    for path, array in sorted(params.items()):
        data.update(path.encode() + np.asarray(array).tobytes())
    return data.hexdigest()


def devices_of(tree: Any) -> set[Any]:
    """The devices that a pytree's arrays lie on."""
    return {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}
