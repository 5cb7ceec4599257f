"""Who gets the next step under mixed load, on the fakes: what starved before, and bounds under random arrivals.

A turn of the engine makes at most one device call on each worker, so that turns and calls are the clock of these tests.
"""

import pytest
from fake_engine import Client, Fakes, Load, make_engine
from serving_fakes import Echo, Gate

from pshare_jax.engine import scoring
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
TASKS = {"t": ECHO, "u": Echo("u")}
BOTH = pytest.mark.parametrize("colocated", [False, True], ids=["split", "colocated"])


def stream(fakes: Fakes, client: Client, **fields) -> str:
    """A request that decodes until the test ends."""
    name = client.ask("stream", [9, 8, 7], max_tokens=1000, **fields)
    fakes.step_until(lambda: len(client.ids(name)) > 0)
    return name


def tokens_beside(fakes: Fakes, client: Client, load: Load, turns: int) -> int:
    """The stream's tokens in so many turns beside clients that ask again when they have an answer."""
    before = len(client.ids("stream"))
    for _ in range(turns):
        load.ask_again()
        fakes.step()
    assert client.ids("stream") == ECHO.answer([9, 8, 7], len(client.ids("stream")))
    return len(client.ids("stream")) - before


# --- decode ------------------------------------------------------------------------------------------------------------


@BOTH
def test_a_stream_goes_on_beside_one_token_clients_of_another_task(colocated):
    """Before: 0 tokens in 400 turns (split), 1 (colocated)."""
    fakes = make_engine(TASKS, pages=512, colocated=colocated)
    client = Client(fakes)
    stream(fakes, client)
    load = Load(client, 6, task="u", max_tokens=1)
    assert tokens_beside(fakes, client, load, 200) >= 99
    assert load.num_answers >= 95


@BOTH
def test_a_stream_goes_on_beside_more_one_token_clients_than_rows(colocated):
    """Before: 0 tokens in 200 turns, in one task with four rows and twelve such clients."""
    fakes = make_engine(TASKS, pages=512, rows=4, chunk=64, colocated=colocated)
    client = Client(fakes)
    stream(fakes, client)
    load = Load(client, 12, max_tokens=1)
    assert tokens_beside(fakes, client, load, 200) >= 199
    assert load.num_answers >= 190


@pytest.mark.parametrize(("num_scorers", "least"), [(0, 200), (1, 100), (8, 99), (32, 99)])
def test_scoring_takes_at_most_every_other_turn(num_scorers, least, monkeypatch):
    """Before: 200, 151, 22 and 6 tokens."""
    monkeypatch.setattr(scoring, "SCORE_TOKENS", 4)
    fakes = make_engine(TASKS, pages=600, chunk=64)
    client = Client(fakes)
    stream(fakes, client)
    load = Load(client, num_scorers, length=21, max_tokens=0, logprobs=0, scores_prompt=True)
    assert tokens_beside(fakes, client, load, 200) >= least
    assert (len(fakes.decode["t"].scored) > 0) is (num_scorers > 0)


# --- prefill -----------------------------------------------------------------------------------------------------------


@BOTH
def test_a_short_prompt_waits_for_two_chunks_of_a_long_prompt_at_most(colocated):
    """Before: 249 chunks."""
    fakes = make_engine(TASKS, pages=1200, chunk=16, colocated=colocated)
    client = Client(fakes)
    long = client.ask("long", [5] * 4000, max_tokens=1)
    fakes.step_until(lambda: len(fakes.prefill[0].chunks) >= 2)
    arrived = len(fakes.prefill[0].chunks)
    client.ask("short", [1, 2, 3, 4], max_tokens=1)
    fakes.run()
    assert fakes.prefill[0].chunks.index((1, 2, 3)) - arrived <= 2
    assert client.end(long) == "length"


# --- admission ---------------------------------------------------------------------------------------------------------


@BOTH
def test_no_stream_is_put_aside_for_prompts_that_have_not_begun(colocated):
    """Before: the second-oldest stream was preempted while younger prompts, admitted but not begun, held the pool."""
    fakes = make_engine(TASKS, pages=400, chunk=16, colocated=colocated)
    client = Client(fakes)
    streams = [client.ask(prompt=[number] * 9, max_tokens=90) for number in range(2)]
    fakes.step_until(lambda: all(client.ids(name) for name in streams))
    prompts = [client.ask(prompt=[10 + number] * 748, max_tokens=4) for number in range(3)]
    while not all(client.ended(name) for name in streams):
        fakes.step()
        assert State.PREEMPTED not in {client.state(name) for name in streams}
    fakes.run()
    assert {client.end(name) for name in (*streams, *prompts)} == {"length"}


def test_a_request_whose_own_worker_has_the_prefix_does_not_wait_for_another_workers_copy():
    """Before: it waited for the first request's transfer, here for ever."""
    fakes = make_engine({"t": ECHO}, num_prefill=2)
    client = Client(fakes)
    prompt = [1] * 30
    client.ask("warms", prompt, max_tokens=1, route=Route(1, 0))
    fakes.run()
    fakes.engine.admission.decode_pools[0].manager.flush()
    copies: list[Gate | None] = [Gate()]
    fakes.decode_stores[0].gate_of = lambda tokens: copies.pop() if copies else None
    client.ask("stuck", prompt, max_tokens=3, route=Route(0, 0))
    fakes.step_until(lambda: not copies)
    client.ask("free", prompt, max_tokens=3, route=Route(1, 0))
    fakes.step_until(lambda: client.ended("free"), 50)
    assert client.ids("free") == ECHO.answer(prompt, 3)
    fakes.engine.abort("stuck")
    fakes.run()


def test_when_a_refused_request_is_admitted_another_worker_looks_at_its_queue_again():
    """Else the short request waits for chunks of the long one, which another prefill worker runs."""
    fakes = make_engine({"t": ECHO}, num_prefill=2, chunk=4, page_size=32, pages=8)
    client = Client(fakes)
    client.ask("holds", [1] * 90, max_tokens=30, route=Route(0, 0))
    fakes.step_until(lambda: client.state("holds") is State.DECODING)
    client.ask("long", [2] * 150, max_tokens=4, route=Route(1, 0))
    fakes.step()
    client.ask("short", [3] * 4, max_tokens=1, route=Route(0, 0))
    fakes.step_until(lambda: client.ended("holds"))
    fakes.step_until(lambda: client.ended("short"), 6)
    assert client.state("long") is State.PREFILLING
    fakes.run()


def test_each_decode_worker_has_rows_of_its_own():
    """A group that is full on one decode worker is admitted to another, where it shares the very same weights."""
    fakes = make_engine({"t": ECHO}, num_decode=2, rows=1)
    client = Client(fakes)
    for number in range(3):
        client.ask(prompt=[number] * 9, max_tokens=40, route=Route(0, 0))
    fakes.step_until(lambda: fakes.engine.decode_workers[0].num_tokens > 3)
    other = client.ask(prompt=[7] * 9, max_tokens=3, route=Route(0, 1))
    fakes.step_until(lambda: client.ended(other), 10)
    fakes.run()
