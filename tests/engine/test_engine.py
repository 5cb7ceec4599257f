"""engine.py over fakes, stepped in turn: a request's life, chunks, order of steps, routes and admission."""

from itertools import pairwise

import pytest
from fake_engine import PAGE, Client, make_engine
from serving_fakes import EOS, Echo

from pshare_jax.engine import transfer
from pshare_jax.engine.engine import EngineDown, EngineFull
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State
from pshare_jax.engine.worker_thread import group_by_devices

pytestmark = pytest.mark.host

SCRIPT = [*b"xyz", EOS]
ENDLESS = [120]


# --- a request's life ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("colocated", [False, True])
def test_a_request_walks_down_once_and_its_tokens_come_up(colocated, pipelined):
    fakes = make_engine({"t": SCRIPT}, colocated=colocated, pipelined=pipelined)
    client = Client(fakes)
    client.ask("a", (5, 6, 7))
    fakes.run()
    assert fakes.prefill[0].chunks == [(5, 6)]
    # The last prompt token is the decode module's first input, then its own tokens; a step too late the host sees the end.
    assert fakes.decode["t"].inputs == [7, 120, 121, 122, *([EOS] if pipelined else [])]
    assert (client.text("a"), client.end("a")) == ("xyz", "stop")
    assert [event.completion_tokens for event in client.events["a"]] == [1, 2, 3, 4]
    stats = fakes.engine.transfers[0].stats
    assert (stats.count, stats.num_pages, stats.num_bytes, stats.failures) == ((0,) * 4 if colocated else (1, 1, 10, 0))
    assert fakes.engine.num_live == 0
    assert fakes.engine.num_ended == {State.FINISHED: 1}


@pytest.mark.parametrize("count", [1, 2])
def test_exactly_max_tokens(count):
    fakes = make_engine({"t": SCRIPT})
    client = Client(fakes)
    client.ask("a", max_tokens=count)
    fakes.run()
    assert (len(fakes.decode["t"].inputs), client.end("a")) == (count, "length")
    assert client.events["a"][-1].completion_tokens == count


@pytest.mark.parametrize("colocated", [False, True])
def test_a_prompt_of_one_token_has_an_empty_kv(colocated):
    fakes = make_engine({"t": SCRIPT}, colocated=colocated)
    client = Client(fakes)
    client.ask("a", (9,))
    fakes.run()
    assert (fakes.prefill[0].chunks, fakes.decode["t"].inputs[0], client.text("a")) == ([], 9, "xyz")


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("length", [1, 2, *range(PAGE - 1, PAGE + 2), *range(2 * PAGE - 1, 2 * PAGE + 2), 33, 34])
def test_answers_depend_on_the_whole_context_and_are_the_same_cold_and_warm(length, colocated):
    echo = Echo("t")
    fakes = make_engine({"t": echo}, colocated=colocated)
    client = Client(fakes)
    prompt = [7 * i % 50 for i in range(length)]
    for cached in (0, (length - 1) // PAGE * PAGE, (length - 1) // PAGE * PAGE):
        name = client.ask(prompt=prompt, max_tokens=9)
        fakes.run()
        assert client.ids(name) == echo.answer(prompt, 9)
        assert client.cached(name) == cached <= length - 1


def test_long_prompts_go_in_chunks():
    fakes = make_engine({"t": SCRIPT}, page_size=16, pages=128, chunk=512, moves=(2, 8, 32))
    client = Client(fakes)
    client.ask("a", [1] * 1300)
    fakes.run()
    assert [len(chunk) for chunk in fakes.prefill[0].chunks] == [512, 512, 275]
    assert client.text("a") == "xyz"
    stats = fakes.engine.prefill_workers[0].stats
    assert (stats.calls, stats.tokens, stats.slots) == (3, 1299, 512 + 512 + 384)
    # Each chunk's pages are sent as soon as it is dispatched, and the tail with the last chunk.
    assert fakes.engine.transfers[0].stats.num_pages == 82


def test_short_chunks_share_a_call():
    fakes = make_engine({"t": SCRIPT}, chunk=64)
    client = Client(fakes)
    for first in range(5):
        client.ask(prompt=[first, 2, 3, 4])
    fakes.run()
    assert fakes.prefill[0].rows == [4, 1]
    assert {client.text(name) for name in client.events} == {"xyz"}


@pytest.mark.parametrize("colocated", [False, True])
def test_tasks_answer_for_themselves(colocated):
    fakes = make_engine({"t": SCRIPT, "u": [*b"other", EOS]}, colocated=colocated)
    client = Client(fakes)
    for name, task in (("a", "t"), ("b", "u"), ("c", "t")):
        client.ask(name, task=task)
    fakes.run()
    assert [client.text(name) for name in "abc"] == ["xyz", "other", "xyz"]


def test_tasks_with_the_same_weights_are_decoded_in_one_step():
    fakes = make_engine({"t": SCRIPT, "u": SCRIPT})
    client = Client(fakes)
    for number, task in enumerate("tutu"):
        client.ask(prompt=[number, 2, 3], task=task)
    fakes.run()
    assert max(fakes.decode["t"].rows) == 4
    assert {client.text(name) for name in client.events} == {"xyz"}


# --- transfers -------------------------------------------------------------------------------------------------------


def test_decoding_waits_until_the_kv_has_arrived_and_others_go_first():
    fakes = make_engine({"t": SCRIPT})
    gate = fakes.hold(1)
    client = Client(fakes)
    client.ask("late", (1, 1, 1))
    client.ask("early", (2, 2, 2))
    fakes.step(20)
    assert client.end("early") == "stop"
    assert client.events["late"] == []
    assert client.state("late") is State.TRANSFERRING
    assert fakes.engine.decode_workers[0].must_poll
    gate.open = True
    fakes.run()
    assert client.text("late") == "xyz"
    assert not fakes.engine.decode_workers[0].must_poll


def test_copies_do_not_pile_up_before_a_decode_worker(monkeypatch):
    monkeypatch.setattr(transfer, "MAX_IN_FLIGHT", 2)
    fakes = make_engine({"t": SCRIPT})
    gate = fakes.hold(1)
    client = Client(fakes)
    names = [client.ask(prompt=(1, number, 1)) for number in range(5)]
    fakes.step(20)
    assert fakes.engine.transfers[0].in_flight == 2
    assert [client.state(name) for name in names] == [State.TRANSFERRING] * 2 + [State.PREFILLING] * 3
    # They are all prefilled, so later requests do not wait for them.
    client.ask("other", (2, 2, 2))
    gate.open = True
    fakes.run()
    assert {client.text(name) for name in client.events} == {"xyz"}


def test_copies_that_come_in_another_order_are_right():
    """Case A3-19: the first of two transfers into neighbouring pages arrives last, while a third request decodes."""
    echo = Echo("t")
    fakes = make_engine({"t": echo})
    gates = [fakes.hold(101, polls=6), fakes.hold(102, polls=2)]
    client = Client(fakes)
    prompts = {"first": [101] * 11, "second": [102] * 11, "runs": [103] * 11}
    for name, prompt in prompts.items():
        client.ask(name, prompt, max_tokens=12)
    fakes.run()
    assert all(gate.open for gate in gates)
    for name, prompt in prompts.items():
        assert client.ids(name) == echo.answer(prompt, 12)


# --- turns -----------------------------------------------------------------------------------------------------------


def noted_turns(fakes):
    """The order of device calls from now on: "p0", "p1" for prefill workers, the task's name for decode steps."""
    turns = []
    for index, prefill in enumerate(fakes.prefill):
        prefill.before = lambda index=index: turns.append(f"p{index}")
    for task, decode in fakes.decode.items():
        decode.before = lambda task=task: turns.append(task)
    return turns


def test_tasks_with_other_weights_take_turns():
    fakes = make_engine({"t": ENDLESS, "u": ENDLESS[:], "v": ENDLESS[:]})
    client = Client(fakes)
    names = [client.ask(prompt=[number, 2], task=task) for number, task in enumerate("ttuvvv")]
    fakes.step_until(lambda: all(client.ids(name) for name in names))
    turns = noted_turns(fakes)
    fakes.step(30)
    assert [turns[start : start + 3] for start in range(0, 30, 3)] == [turns[:3]] * 10
    assert sorted(turns[:3]) == ["t", "u", "v"]


def test_a_group_has_as_many_rows_as_a_step_and_every_step_has_them_all():
    fakes = make_engine({"t": ENDLESS}, rows=4, pages=256, chunk=16)
    client = Client(fakes)
    names = [client.ask(prompt=[number] * 17, max_tokens=10 + number) for number in range(20)]
    waiting = names.copy()
    while not fakes.engine.idle:
        rows = [len(client.ids(name)) for name in names]
        decoding = [name for name in names if client.state(name) is State.DECODING]
        fakes.step()
        assert len(decoding) <= 4
        made = [len(client.ids(name)) - old for name, old in zip(names, rows, strict=True)]
        assert all(made[names.index(name)] == 1 for name in decoding)
        # The oldest that waits is the next, and no more hold pages than two steps have rows, and one more prompt.
        waiting = [name for name in waiting if client.state(name) is not State.DECODING and not client.ended(name)]
        assert waiting == names[len(names) - len(waiting) :]
        running = [name for name in names if client.state(name) in (State.TRANSFERRING, State.DECODING)]
        assert len(running) <= 9
    fakes.check()
    assert [len(client.ids(name)) for name in names] == [10 + number for number in range(20)]
    # While others wait, no step has a row to spare.
    full = [index for index, rows in enumerate(fakes.decode["t"].rows) if rows == 4]
    assert full == list(range(full[0], full[-1] + 1))


@pytest.mark.parametrize("workers", [1, 2])
def test_colocated_answers_wait_for_one_chunk_at_most(workers):
    """At most one prefill chunk runs between two decode steps, for any number of prefill workers on the devices."""
    devices = [{0}] * workers
    fakes = make_engine(
        {"t": ENDLESS}, num_prefill=workers, num_decode=workers, colocated=True, devices=(devices, devices)
    )
    client = Client(fakes)
    client.ask("runs", (1, 2, 3), max_tokens=200, route=Route(0, 0))
    fakes.step_until(lambda: len(client.ids("runs")) == 2)
    turns = noted_turns(fakes)
    for number in range(4):
        client.ask(prompt=[number] * 100, max_tokens=1, route=Route(number % workers, number % workers))
    fakes.step(28)
    chunks = [turn for turn in turns if turn != "t"]
    assert len(chunks) == 4 * 7
    assert all("t" in pair for pair in pairwise(turns))
    # The workers run their chunks in turn.
    assert workers == 1 or all(first != second for first, second in pairwise(chunks))


# --- admission and routes --------------------------------------------------------------------------------------------


def test_who_does_not_fit_waits_and_holds_nothing():
    fakes = make_engine({"t": SCRIPT}, decode_pages=6)
    client = Client(fakes)
    for name in "abc":
        client.ask(name, [ord(name)] * 14)
    fakes.step()
    assert [client.state(name) for name in "abc"] == [State.DECODING, State.WAITING, State.WAITING]
    waiting = client.sequences["b"]
    assert (waiting.prefill.table, waiting.decode.table) == (None, None)
    fakes.run()
    assert {client.text(name) for name in "abc"} == {"xyz"}


def test_a_full_decode_pool_does_not_hold_up_the_others():
    fakes = make_engine({"t": ENDLESS}, num_decode=2, decode_pages=6)
    client = Client(fakes)
    for name, decode in (("a", 0), ("b", 0), ("c", 1)):
        client.ask(name, [ord(name)] * 14, max_tokens=6, route=Route(0, decode))
    fakes.step(2)
    assert [client.state(name) for name in "abc"] == [State.DECODING, State.WAITING, State.DECODING]
    fakes.run()
    assert {client.end(name) for name in "abc"} == {"length"}


def test_many_arrivals_at_once_all_finish():
    """Case A3-09: the decode pool has room for two, the prefill pool for four."""
    echo = Echo("t")
    fakes = make_engine({"t": echo}, pages=25, decode_pages=13)
    client = Client(fakes)
    prompts = {client.ask(prompt=[number] * (1 + 5 * number % 23), max_tokens=4): number for number in range(64)}
    fakes.run()
    for name, number in prompts.items():
        assert client.ids(name) == echo.answer([number] * (1 + 5 * number % 23), 4)


def test_full_and_stopped_engines_refuse():
    fakes = make_engine({"t": SCRIPT}, max_requests=2)
    client = Client(fakes)
    client.ask("a")
    client.ask("b")
    with pytest.raises(EngineFull):
        client.ask("c")
    fakes.run()
    client.ask("d")
    fakes.engine.stop()
    assert client.end("d") == "abort"
    assert not fakes.engine.healthy
    with pytest.raises(EngineDown):
        client.ask("e")
    fakes.run()


@pytest.mark.parametrize("policy", ["prefix", "round_robin", "least_loaded"])
def test_prefill_work_is_spread_over_the_workers(policy):
    fakes = make_engine({"t": SCRIPT}, num_prefill=2, policy=policy)
    client = Client(fakes)
    for number in range(4):
        client.ask(prompt=[number] * 9)
    fakes.run()
    assert [prefill.num_tokens for prefill in fakes.prefill] == [16, 16]


def test_the_same_prompt_goes_where_its_pages_are():
    fakes = make_engine({"t": SCRIPT}, num_prefill=2)
    client = Client(fakes)
    for _ in range(4):
        client.ask(prompt=[5] * 9)
        fakes.run()
    assert sorted(prefill.num_tokens for prefill in fakes.prefill) == [0, 8]


def test_all_routes_reach_every_task_of_every_worker_and_every_prefill_worker():
    engine = make_engine({"t": SCRIPT, "u": SCRIPT}, num_prefill=3).engine
    assert engine.router.all_routes() == [(Route(0, 0), "t"), (Route(1, 0), "u"), (Route(2, 0), "t")]
    engine = make_engine({"t": SCRIPT, "u": SCRIPT}, num_decode=2).engine
    assert engine.router.all_routes() == [(Route(0, decode), task) for decode in (0, 1) for task in "tu"]
    engine = make_engine({"t": SCRIPT, "u": SCRIPT}, num_prefill=2, prefill_tasks=[["t"], ["u"]]).engine
    assert engine.router.all_routes() == [(Route(0, 0), "t"), (Route(1, 0), "u")]


def test_workers_that_share_devices_share_a_thread():
    assert group_by_devices([{0}, {1}, {0}]) == [[1], [0, 2]]
    assert group_by_devices([{0}, {1}, {0, 1}, {2}]) == [[0, 1, 2], [3]]
