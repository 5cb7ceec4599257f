"""Real engines over tiny models give, token by token, what the plain loop gives: families x page sizes x meshes x sharing
x chunks, cold and warm (design.md, invariants 1, 2, 3, 5, 6, 8).

The table covers all pairs of values; the rest of a larger product is slow. Every engine serves a base, a full and a
LoRA task at once.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_world import (
    ANSWER,
    LOGPROB_TOLERANCE,
    LONG,
    SHARINGS,
    TASKS,
    World,
    WorldEngines,
    assert_prefilled_once,
    devices_of,
    digest,
    edges,
    full_len,
)
from memory_maps import drop_programs
from tiny import FAMILIES, VOCAB
from tiny_engine import Engines, prefill_tokens

from pshare_jax.engine.config import Placement, placed
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.request import Request
from pshare_jax.share.factorize import SharedModel

PAGE_SIZES = (1, 4, 16)
MESHES = ("1-1", "2-1", "1-2", "4-2", "2-4")
"""Devices of the prefill and of the decode worker."""
PLACES = ("split", "colocated")
CHUNKS = ("below", "page", "above", "many")
"""Tokens of a prefill chunk: a page less one, a page, a page and one, and 16 or 48 in several pages."""


class Case(NamedTuple):
    """One engine."""

    family: str
    page_size: int
    meshes: str
    place: str
    sharing: str
    chunk: int

    @property
    def values(self) -> tuple[Any, ...]:
        """Its value on every axis."""
        kinds = {self.page_size - 1: "below", self.page_size: "page", self.page_size + 1: "above"}
        return (*self[:-1], kinds.get(self.chunk, "many"))

    @property
    def placement(self) -> Placement:
        """Its devices: decode workers begin at the fifth, so that engines share compilations."""
        num_prefill, num_decode = map(int, self.meshes.split("-"))
        decode = list(range(4, 4 + num_decode))
        return placed([decode if self.place == "colocated" else list(range(num_prefill))], [decode])


AXES = (FAMILIES, PAGE_SIZES, MESHES, PLACES, SHARINGS, CHUNKS)
TABLE = (
    Case("llama", 1, "1-2", "split", "isolated", 1),
    Case("llama", 1, "1-2", "split", "shared", 16),
    Case("llama", 1, "4-2", "split", "shared", 2),
    Case("llama", 4, "2-1", "split", "isolated", 5),
    Case("llama", 4, "2-1", "split", "shared", 3),
    Case("llama", 4, "2-4", "split", "isolated", 5),
    Case("llama", 4, "2-4", "split", "shared", 3),
    Case("llama", 16, "1-1", "colocated", "isolated", 15),
    Case("qwen3", 1, "2-4", "split", "shared", 16),
    Case("qwen3", 4, "1-1", "colocated", "shared", 16),
    Case("qwen3", 16, "1-1", "colocated", "shared", 17),
    Case("qwen3", 16, "1-1", "split", "shared", 15),
    Case("qwen3", 16, "1-2", "split", "shared", 15),
    Case("qwen3", 16, "2-1", "split", "shared", 16),
    Case("qwen3", 16, "4-2", "split", "isolated", 48),
    Case("gemma3", 1, "1-1", "colocated", "shared", 1),
    Case("gemma3", 1, "2-1", "split", "shared", 48),
    Case("gemma3", 4, "1-2", "split", "isolated", 5),
    Case("gemma3", 4, "4-2", "split", "isolated", 4),
    Case("gemma3", 4, "4-2", "split", "shared", 3),
    Case("gemma3", 16, "2-4", "split", "shared", 16),
)


UNPIPELINED = TABLE[::4]
"""Cases whose engines fetch each decode step before they dispatch the next."""


def possible(values: tuple[Any, ...]) -> bool:
    """Colocated workers have one mesh, and no chunk has 0 tokens."""
    _, page_size, meshes, place, _, chunk = values
    return (place == "split" or meshes == "1-1") and (page_size > 1 or chunk != "below")


def larger_product() -> list[Case]:
    """The product of all axes, except that the chunks take turns; without the table's cases."""
    cases = []
    for index, values in enumerate(itertools.product(*AXES[:-1])):
        b = values[1]
        chunk = [size for size in (b - 1, b, b + 1, 16, 48, 1) if size][index % 5]
        if possible((*values, "page")):
            cases.append(Case(*values, chunk))
    return [case for case in cases if case not in TABLE]


def pairs(values: tuple[Any, ...]) -> set[tuple[int, int, Any, Any]]:
    """Its values on every two axes."""
    return {(i, j, values[i], values[j]) for i, j in itertools.combinations(range(len(values)), 2)}


def test_the_table_covers_all_pairs():
    wanted = set().union(*(pairs(values) for values in itertools.product(*AXES) if possible(values)))
    assert len(TABLE) <= 24
    assert all(possible(case.values) for case in TABLE)
    assert wanted == set().union(*(pairs(case.values) for case in TABLE))
    sizes = {(case.page_size, case.chunk) for case in TABLE}
    assert {(1, 16), (1, 48), (4, 16), (16, 48)} <= sizes


@pytest.fixture(scope="module")
def worlds(world_of) -> Iterator[dict[str, World]]:
    """The families' worlds; their bases must be the same to the last bit when all is over."""
    made = {family: world_of(family) for family in FAMILIES}
    before = {family: digest(world.loops["shared"].model.params) for family, world in made.items()}
    yield made
    assert before == {family: digest(world.loops["shared"].model.params) for family, world in made.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_the_models_notice_every_page(family, task, worlds):
    """cases.md, Words: without this no other test here counts."""
    world = worlds[family]
    for page, size, what, ids, logprobs in spoiled(world.loops["shared"].oracle(task), task, world.long):
        # One token of fifty changes no more than a score: our checks look at the scores too.
        assert ids or size == 1, f"{what} {page}"
        assert logprobs > 2 * LOGPROB_TOLERANCE, f"{what} {page}"


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES[1:])]
)
def test_the_padded_oracle_is_the_plain_loop(family, worlds):
    loop = worlds[family].loops["shared"]
    for length in (1, 16, 33):
        request = loop.request("math", worlds[family].prompt(length))
        assert loop.expected(request).ids == Engines.expected(loop, request).ids


def spoiled(shared: SharedModel, task: str, prompt: tuple[int, ...]) -> Iterator[tuple[slice, int, str, bool, float]]:
    """For every page changed or dropped: (tokens, page size, what, whether 16 ids notice it, by how much the logprobs of
    an answer of the usual length do).
    """
    # The last prompt token is the decode module's own.
    pages = [(b, slice(start, min(start + b, LONG - 1))) for b in PAGE_SIZES for start in range(0, LONG - 1, b)]
    rows, draw = np.tile(prompt, (1 + 2 * len(pages), 1)), np.random.default_rng(1)
    for row, (_, page) in enumerate(pages, 1):
        rows[row, page] = (rows[row, page] + draw.integers(1, VOCAB, page.stop - page.start)) % VOCAB
    kv = shared.prefill(rows[:, :-1])
    layers = jax.tree.map(np.array, kv.layers)
    for array in jax.tree.leaves(layers):
        for row, (_, page) in enumerate(pages, 1 + len(pages)):
            array[row, :, page] = 0
    kv = dataclasses.replace(kv, layers=jax.tree.map(jnp.asarray, layers)).grown(LONG + 16)
    ids, scores = rows[:, -1:], []
    for _ in range(16):
        logits, kv = shared.decode(task, ids[:, -1:], kv, donate=True)
        scores.append(np.asarray(jax.nn.log_softmax(logits[:, -1])))
        ids = np.append(ids, scores[-1].argmax(-1, keepdims=True), 1)
    logprobs = np.max(scores, -1).T[:, :ANSWER]
    for row, (size, page) in enumerate([*pages, *pages], 1):
        what = "changed" if row <= len(pages) else "dropped"
        yield page, size, what, bool((ids[row] != ids[0]).any()), float(np.abs(logprobs[row] - logprobs[0]).max())


@pytest.mark.parametrize("case", TABLE, ids=lambda case: "-".join(map(str, case)))
def test_answers_are_the_plain_loops(case, worlds):
    check(case, worlds[case.family])


@pytest.fixture
def few_programs_here() -> Iterator[None]:
    """The larger product compiles more programs within this module than a process may hold at once."""
    yield
    drop_programs(30_000)


@pytest.mark.slow
@pytest.mark.parametrize("case", larger_product(), ids=lambda case: "-".join(map(str, case)))
def test_more_answers_are_the_plain_loops(case, worlds, few_programs_here):
    check(case, worlds[case.family])


def check(case: Case, world: World) -> None:
    """All prompts at once, then one by one for other tasks, then a prompt that continues an answer."""
    plan = {"page_size": case.page_size, "chunk": case.chunk, "sharing": case.sharing}
    engines = world.engines(case.placement, **plan, pipelined=case not in UNPIPELINED)
    base = digest(engines.engine.prefill_specs[0].weights.params)
    b, lengths = case.page_size, sorted({1, *edges(case.page_size)})
    answers = engines.check(*ask(engines, world, lengths, 0))
    assert prefill_tokens(engines.engine) == sum(length - 1 for length in lengths) + long_tokens(case)
    again = ask(engines, world, lengths, 1)
    warm = engines.check_one_by_one(again, itertools.cycle((0, 3, 1)))
    for request, answer in zip(again, warm, strict=True):
        # In the isolated baseline only the longest prompt was the same task's before.
        hits = case.sharing == "shared" or len(request.prompt) == LONG
        assert answer.cached_tokens == (full_len(len(request.prompt), b) if hits else 0)
    # A prompt that continues another task's answer must not hit a page with generated tokens.
    turn = engines.check(engines.turn(TASKS[-1], (*world.long, *answers[-2].ids), logprobs=0))
    assert turn[0].cached_tokens == full_len(LONG, b)
    assert_prefilled_once(engines.engine, [*answers, *warm, *turn])
    assert digest(engines.engine.prefill_specs[0].weights.params) == base
    check_devices(case, engines)


def ask(engines: WorldEngines, world: World, lengths: list[int], shift: int) -> list[Request]:
    """A request for each length, the tasks in turn, and the long prompt for every task."""
    tasks = itertools.islice(itertools.cycle(TASKS), shift, None)
    short = zip(tasks, map(world.prompt, lengths), strict=False)
    return [
        engines.request(task, prompt, logprobs=0) for task, prompt in [*short, *((task, world.long) for task in TASKS)]
    ]


def long_tokens(case: Case) -> int:
    """Tokens that the long prompt costs, asked by every task at once: in common all but the tails, or nothing."""
    whole, in_common = len(TASKS) * (LONG - 1), (len(TASKS) - 1) * full_len(LONG, case.page_size)
    return whole - in_common if case.sharing == "shared" else whole


def check_devices(case: Case, engines: WorldEngines) -> None:
    """Weights and pages of each worker lie on exactly its devices."""
    engine, devices = engines.engine, jax.devices()
    prefill = [(spec.weights.params, DevicePages.of(spec.pool).pages) for spec in engine.prefill_specs]
    decode = [
        ([weights.params for weights in worker._tasks.values()], DevicePages.of(worker.pool).pages)
        for worker in engine.decode_workers
    ]
    wanted = [{devices[i] for i in workers[0].devices} for workers in (case.placement.prefill, case.placement.decode)]
    assert [devices_of(prefill), devices_of(decode)] == wanted
    assert wanted[0].isdisjoint(wanted[1]) or case.place == "colocated"
