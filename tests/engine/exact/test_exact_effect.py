"""The effect of sharing prompt KV, in exact counts: an agent session over a growing context, shared and isolated.

Four tasks with weights of their own are called one after another, three turns long. Each call's prompt is the context
and an instruction that is not kept; then the context grows by the answer and a tool's output.
"""

import numpy as np
import pytest
from tiny import VOCAB, tiny_folder, tiny_module
from tiny_engine import SPLIT, Answer, Engines, prefill_tokens, settle

from pshare_jax.engine.sequence import State

PAGE, CHUNK = 16, 512
TASKS = ("plan", "search", "code", "review")
TURNS = 3
CONTEXT, INSTRUCTION, ANSWER, TOOL = 2048, 32, 16, 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("effect")
    base = tiny_folder("llama", root / "base", num_hidden_layers=2, max_position_embeddings=8192)
    modules = [tiny_module(base, root / str(seed), seed=seed) for seed in (1, 2)]
    lora = tiny_module(base, root / "lora", kind="lora")
    return base, dict(zip(TASKS, ("base", *modules, lora), strict=True))


@pytest.fixture
def make(folders):
    base, tasks = folders

    def engines(sharing):
        # Each isolated task has as many pages as its calls need, and the shared engine the same total.
        return Engines(base, tasks, SPLIT, page_size=PAGE, pages=1024, chunk=CHUNK, rows=2, sharing=sharing)

    return engines


def session(engines):
    """The answers of a session's calls, in order."""
    draw = np.random.default_rng(3)
    context, answers = draw.integers(0, VOCAB, CONTEXT).tolist(), []
    for _ in range(TURNS):
        for task in TASKS:
            instruction = draw.integers(0, VOCAB, INSTRUCTION).tolist()
            answers += engines.run(engines.request(task, context + instruction, ANSWER))
            assert answers[-1].error is None
            assert len(answers[-1].ids) == ANSWER
            context += answers[-1].ids + draw.integers(0, VOCAB, TOOL).tolist()
    return answers


@pytest.mark.parametrize(
    ("sharing", "prefilled", "percent"),
    [("shared", 3_300, 89.0), ("isolated", 11_604, 61.6)],
)
def test_a_session_prefills_what_is_new(make, sharing, prefilled, percent):
    """Shared: the first prompt, then 16 + 64 new tokens and 31 of the instruction for each of 11 calls. Isolated: each
    task's first prompt whole, then four calls' new tokens and an instruction, twice.
    """
    engines = make(sharing)
    answers = session(engines)
    new, grown = INSTRUCTION - 1, ANSWER + TOOL
    if sharing == "shared":
        assert prefilled == CONTEXT + new + 11 * (grown + new)
    else:
        firsts = sum(CONTEXT + call * grown + new for call in range(4))
        assert prefilled == firsts + 2 * 4 * (4 * grown + new)
    assert prefill_tokens(engines.engine) == prefilled
    stats = [worker.pool.cache_stats for worker in engines.engine.prefill_workers]
    cached, prompts = sum(pool.cached_tokens for pool in stats), sum(pool.prompt_tokens for pool in stats)
    assert prompts == sum(CONTEXT + call * grown + INSTRUCTION for call in range(12))
    # A prompt's last token is never prefilled, and never counts as cached.
    assert cached == prompts - 12 - prefilled == sum(answer.cached_tokens for answer in answers)
    assert round(100 * cached / prompts, 1) == percent


@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_a_session_keeps_one_copy_of_its_context(make, sharing):
    """The decode pool's full pages after it: the context's once, or once for each task; and each call's own
    instruction's first page.
    """
    engines = make(sharing)
    session(engines)
    [worker] = engines.engine.decode_workers
    pages = [(CONTEXT + call * (ANSWER + TOOL)) // PAGE for call in range(12)]
    kept = max(pages) if sharing == "shared" else sum(pages[-4:])
    assert worker.pool.manager.num_cached == kept + 12
    moved = engines.engine.transfers[0].stats
    # The other transferred pages are the calls' tails.
    assert moved.num_pages == kept + 12 + 12


@pytest.mark.parametrize(("sharing", "copies"), [("shared", 1), ("isolated", len(TASKS))])
def test_tasks_at_work_on_one_context_hold_it_once(make, sharing, copies):
    """S + N U pages, or N (S + U)."""
    engines = make(sharing)
    engine, draw = engines.engine, np.random.default_rng(4)
    context = draw.integers(0, VOCAB, CONTEXT).tolist()
    prompts = [context + draw.integers(0, VOCAB, INSTRUCTION).tolist() for _ in TASKS]
    asked = zip(TASKS, prompts, strict=True)
    answers = [Answer(engine, engines.request(task, prompt, ANSWER)) for task, prompt in asked]
    while not all(answer.sequence.state is State.DECODING for answer in answers):
        engine.step()
    shared, own = CONTEXT // PAGE, -(-(INSTRUCTION + 1) // PAGE)
    assert engine.decode_workers[0].pool.manager.num_used == copies * shared + len(TASKS) * own
    assert prefill_tokens(engine) == copies * CONTEXT + len(TASKS) * (INSTRUCTION - 1)
    while not all(answer.ended for answer in answers):
        engine.step()
    settle(engine)
    assert all(answer.error is None for answer in answers)


@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_the_last_call_of_a_session_is_the_plain_loops(make, sharing):
    engines = make(sharing)
    answer = session(engines)[-1]
    expected = engines.expected(answer.sequence.request)
    assert expected.smallest_gap > 1e-4
    assert answer.ids == expected.ids
