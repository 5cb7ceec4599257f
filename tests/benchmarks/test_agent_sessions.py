"""The load of benchmarks/agents.py: sessions, arrivals, traces and the shipped configs."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.agents_load.campaign import sessions_of
from benchmarks.agents_load.config import BenchConfig, LoadConfig, TraceConfig, WorkloadConfig, check, points
from benchmarks.agents_load.traces import read_trace, write_trace
from benchmarks.agents_load.workload import Call, Session, make_sessions, with_arrivals
from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings

pytestmark = pytest.mark.host

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "bench").glob("*.yaml"))
SIZES = st.integers(0, 40)
WORKLOADS = st.builds(
    WorkloadConfig,
    shape=st.sampled_from(["react", "reflexion", "streams"]),
    sessions=st.integers(1, 4),
    turns=st.integers(1, 3),
    context=st.integers(1, 60),
    instruction=SIZES,
    output=st.integers(1, 20),
    tool_output=SIZES,
    seed=st.integers(0, 3),
)
MODELS = st.integers(1, 4).map(lambda num: [f"m{i}" for i in range(num)])


def shared_prefix(one, other):
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def prefilled(sessions, key_of):
    """Tokens that a server with an endless cache of pages of 16 prefills, with one cache for each key."""
    cache, total = set(), 0
    for session in sessions:
        for call in session.calls:
            context = call.prompt[:-1]
            pages = [(key_of(call.model), context[:end]) for end in range(16, len(context) + 1, 16)]
            total += len(context) - 16 * next((at for at, page in enumerate(pages) if page not in cache), len(pages))
            cache.update(pages)
    return total


@given(WORKLOADS, MODELS)
def test_a_session_has_the_lengths_and_the_order_of_its_shape(config, models):
    grown = config.output + config.tool_output
    for number, session in enumerate(make_sessions(config, models, 5)):
        called = [models[number % len(models)]] if config.shape == "streams" else models
        assert [call.model for call in session.calls] == called * config.turns
        for index, call in enumerate(session.calls):
            trial, step = divmod(index, len(called))
            kept = trial * config.output + step * grown if config.shape == "reflexion" else index * grown
            assert len(call.prompt) == config.context + kept + config.instruction
            assert call.output == config.output
            assert max(call.prompt) < config.vocab_size


@given(WORKLOADS, MODELS)
def test_contexts_grow_and_instructions_are_not_kept(config, models):
    for session in make_sessions(replace(config, instruction=10), models, 0):
        contexts = [call.prompt[:-10] for call in session.calls]
        for before, after in combinations(contexts, 2):
            least = config.context if config.shape == "reflexion" else len(before)
            assert shared_prefix(before, after) >= least
        # 10 drawn tokens are equal by chance once in 32000 ** 10.
        for before, after in zip(session.calls, session.calls[1:], strict=False):
            assert after.prompt[: len(before.prompt)] != before.prompt


def test_reflexion_keeps_the_reflections_alone():
    config = WorkloadConfig(shape="reflexion", turns=3, context=8, instruction=0, output=4, tool_output=2)
    first, second, third = (call.prompt for call in make_sessions(config, ["m"], 0)[0].calls)
    assert (second[:8], third[:12]) == (first, second)


@given(WORKLOADS, MODELS)
def test_sessions_depend_on_the_seed_alone_and_share_nothing(config, models):
    config = replace(config, context=8)
    sessions = make_sessions(config, models, 3)
    assert sessions == make_sessions(config, models, 3)
    others = [*sessions, *make_sessions(config, models, 4)]
    assert len({session.name for session in others}) == len(others)
    assert len({session.calls[0].prompt[:8] for session in others}) == len(others)


def test_every_run_has_prompts_of_its_own():
    """A server without /flush_cache must not have them cached from a run before."""
    config = BenchConfig(workload=WorkloadConfig(sessions=2, context=8), load=LoadConfig([1, 2], num_tasks=[1, 2]))
    runs = [sessions_of(config, point, repetition) for point in points(config) for repetition in range(3)]
    starts = {session.calls[0].prompt[:8] for sessions in runs for session in sessions}
    assert len(starts) == sum(map(len, runs)) == 24


def test_delays_follow_the_first_call():
    sessions = make_sessions(WorkloadConfig(tool_delay=0.5, context=4), ["a", "b"], 0)
    assert [[call.delay for call in session.calls] for session in sessions] == [[0.0, *[0.5] * 5]] * 8


@given(st.floats(0.01, 100), st.integers(1, 30), st.integers(0, 5))
def test_arrivals_scale_with_the_rate(rate, num, seed):
    sessions = [Session(str(i), ()) for i in range(num)]
    once = [session.arrival for session in with_arrivals(sessions, rate, seed)]
    assert once == sorted(once)
    twice = [session.arrival for session in with_arrivals(sessions, 2 * rate, seed)]
    assert twice == pytest.approx([at / 2 for at in once])


def test_poisson_arrivals_have_the_rate():
    arrivals = with_arrivals([Session(str(i), ()) for i in range(4000)], 2.0, 0)
    assert 4000 / arrivals[-1].arrival == pytest.approx(2.0, rel=0.1)


CALLS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=8)


@given(CALLS, st.sampled_from([4, 16]))
def test_a_replayed_trace_has_the_calls_and_shares_the_same_blocks(tmp_path_factory, drawn, block):
    """Prompts are made of few pieces, so that many begin alike."""
    pieces = [tuple(range(100 * number, 100 * number + 7)) for number in range(4)]
    sent, prompt = [], ()
    for at, (piece, output) in enumerate(drawn):
        prompt = pieces[piece] if piece == 3 else prompt + pieces[piece]
        sent.append((f"s{at % 2}", 0.25 * at, Call(f"m{at % 3}", prompt, output, 0.125)))
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    write_trace(path, reversed(sent), block)
    sessions = read_trace(path, block, 32_000, 0, ["none"])
    assert [session.name for session in sessions] == ["s0", "s1"][: len(drawn)]
    assert [session.arrival for session in sessions] == [0.0, 0.25][: len(drawn)]
    found = {name: list(calls) for name, calls in ((session.name, session.calls) for session in sessions)}
    replayed = []
    for at, (name, _, call) in enumerate(sent):
        again = found[name].pop(0)
        assert (again.model, again.output, len(again.prompt)) == (call.model, call.output, len(call.prompt))
        assert (again.delay, again.earliest) == (0.125 if at > 1 else 0.0, 0.0)
        replayed.append(again.prompt)
    prompts = [call.prompt for _, _, call in sent]
    for (a, again), (b, other) in combinations(zip(prompts, replayed, strict=True), 2):
        assert shared_prefix(again, other) // block == shared_prefix(a, b) // block


def test_a_written_trace_is_mooncakes_format(tmp_path):
    first, second = Call("a", (1, 2, 3, 4, 5), 7), Call("b", (1, 2, 3, 4, 6, 7), 8, 0.5)
    write_trace(tmp_path / "t", [("s", 0.0, first), ("s", 2.0, second)], 4)
    assert [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()] == [
        {
            "session_id": "s",
            "timestamp": 0.0,
            "input_length": 5,
            "output_length": 7,
            "hash_ids": [0, 1],
            "extra": {"model": "a"},
        },
        {
            "session_id": "s",
            "timestamp": 2000.0,
            "delay": 500.0,
            "input_length": 6,
            "output_length": 8,
            "hash_ids": [0, 2],
            "extra": {"model": "b"},
        },
    ]


def test_traces_of_others_are_replayed(tmp_path):
    """Mooncake's own lines have no sessions, models or delays; sessions without delays keep their times."""
    lines = [
        {"timestamp": 1000, "input_length": 20, "output_length": 3, "hash_ids": [0, 1]},
        {"timestamp": 4000, "input_length": 30, "output_length": 3, "hash_ids": [0, 2]},
        {"timestamp": 4000, "input_length": 5, "output_length": 3, "session_id": "s", "model": "b"},
        {"timestamp": 6000, "input_length": 5, "output_length": 3, "session_id": "s"},
    ]
    path = tmp_path / "t"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    one, two, three = read_trace(path, 16, 1000, 0, ["a", "b"])
    assert [session.arrival for session in (one, two, three)] == [0.0, 3.0, 3.0]
    assert shared_prefix(one.calls[0].prompt, two.calls[0].prompt) // 16 == 1
    assert [call.model for call in (*one.calls, *two.calls, *three.calls)] == ["a", "b", "b", "b"]
    assert [len(call.prompt) for call in (*one.calls, *two.calls)] == [20, 30]
    assert three.calls[0].prompt != three.calls[1].prompt
    assert [call.earliest for call in three.calls] == [0.0, 5.0]
    assert [one, two, three] == read_trace(path, 16, 1000, 0, ["a", "b"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "is empty"), ("{", "line 1 of .* is not JSON"), ('{"text_input": "x"}', "line 1 .* has no input_length")],
)
def test_traces_that_cannot_be_replayed_are_refused(tmp_path, text, problem):
    (tmp_path / "t").write_text(text)
    with pytest.raises(PshareError, match=problem):
        read_trace(tmp_path / "t", 16, 100, 0, ["a"])
    with pytest.raises(PshareError, match="Cannot read the trace"):
        read_trace(tmp_path / "missing", 16, 100, 0, ["a"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = load_settings(BenchConfig, path)
    check(config)
    # The longest sequence fits the pool of each task, of which an isolated server has one for every task.
    pages = int(dict(entry.split("=") for entry in config.serve)["kv.pages"])
    pools = len(config.tasks.models) if "isolated" in config.sharing else 1
    for point in points(config):
        calls = [call for session in sessions_of(config, point, 0) for call in session.calls]
        assert max(len(call.prompt) + call.output for call in calls) / 16 < pages / pools - 1


@pytest.mark.parametrize("name", ["w1", "w1_full", "w1_small_pool"])
def test_w1_is_what_it_was(name):
    """3,300 tokens a session are prefilled shared and 11,604 isolated, if nothing is evicted."""
    path = next(path for path in CONFIGS if path.stem == name)
    config = load_settings(BenchConfig, path)
    (point,) = points(config)
    sessions = sessions_of(config, point, 0)
    assert (point.at_once, len(sessions)) == (4, 8)
    assert prefilled(sessions, lambda model: "base") == 8 * 3300
    assert prefilled(sessions, lambda model: model) == 8 * 11604


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (BenchConfig(load=LoadConfig()), "at_once .* or rates"),
        (BenchConfig(load=LoadConfig([1], [1.0])), "at_once .* or rates"),
        (BenchConfig(load=LoadConfig([0])), "load.at_once must be at least 1"),
        (BenchConfig(load=LoadConfig(rates=[0.0])), "load.rates must be more than 0"),
        (BenchConfig(load=LoadConfig([1], num_tasks=[5])), "load.num_tasks goes up to 4"),
        (BenchConfig(workload=WorkloadConfig(sessions=0)), "workload.sessions must be at least 1"),
        (BenchConfig(workload=WorkloadConfig(tool_delay=-1.0)), "workload.tool_delay must be at least 0"),
        (BenchConfig(trace=TraceConfig("t", 0)), "trace.block_size must be at least 1"),
        (BenchConfig(sharing=[]), "sharing is empty"),
        (BenchConfig(urls={"x": "http://x/v1"}), "tasks.names must list"),
    ],
)
def test_bad_configs_are_refused(config, problem):
    with pytest.raises(PshareError, match=problem):
        check(config)
