"""Pages that only a decode pool has go back to the prefill pool, so that their tokens are not prefilled again."""

import time

import pytest
from fake_engine import Client, Fakes, make_engine
from serving_fakes import Echo, Gate

from pshare_jax.engine.request import FAILED
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
BEGINNING = [number % 250 for number in range(96)]
"""24 pages."""
LONGER = [*BEGINNING, 1, 2, 3, 4, 5, 6]


def forgetful(num_prefill: int = 1, num_decode: int = 1, **settings) -> tuple[Fakes, Client]:
    """An engine whose decode pools have `BEGINNING`, and no prefill pool."""
    fakes = make_engine({"t": ECHO}, num_prefill=num_prefill, num_decode=num_decode, pages=128, **settings)
    client = Client(fakes)
    for index in range(num_decode):
        client.ask(f"before {index}", [*BEGINNING, 7], max_tokens=1, route=Route(0, index))
        fakes.run()
    for pool in fakes.engine.admission.prefill_pools:
        pool.manager.flush()
    return fakes, client


def num_prefilled(fakes: Fakes) -> int:
    return sum(worker.num_tokens for worker in fakes.prefill)


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_pages_that_only_the_decode_pool_has_are_not_prefilled_again(num_prefill, num_decode):
    """Before: 101 of 102 tokens were prefilled again."""
    fakes, client = forgetful(num_prefill, num_decode)
    before = num_prefilled(fakes)
    client.ask("again", LONGER, max_tokens=9, route=Route(num_prefill - 1, num_decode - 1))
    fakes.run()
    assert client.ids("again") == ECHO.answer(LONGER, 9)
    assert client.cached("again") == 96
    assert num_prefilled(fakes) - before == 5
    assert fakes.engine.admission.num_returned == 24
    # The prefill pool has them again.
    pool = fakes.engine.admission.prefill_pools[num_prefill - 1]
    assert pool.manager.num_hits(client.sequences["again"].keys) == 25


def returning(fakes: Fakes, client: Client, most: int = 4) -> None:
    """Asks for the longer prompt and waits until its pages are on their way back, at most so many of the six parts."""
    client.ask("again", LONGER, max_tokens=9, route=Route(len(fakes.prefill) - 1, 0))
    fakes.step_until(lambda: len(client.sequences["again"].prefill.returning) in range(1, most + 1))


def slowly(tokens: set[int]) -> Gate:
    return Gate(polls=3)


@pytest.mark.parametrize("num_prefill", [1, 2])
@pytest.mark.parametrize("aborted", [False, True])
def test_a_request_may_wait_for_pages_that_return_for_another(aborted, num_prefill):
    fakes, client = forgetful(num_prefill)
    for store in fakes.prefill_stores:
        store.gate_of = slowly
    before = num_prefilled(fakes)
    returning(fakes, client)
    client.ask("waits", [*LONGER[:-1], 9], max_tokens=9, route=Route(num_prefill - 1, 0))
    client.ask("elsewhere", [*LONGER[:-1], 8], max_tokens=9, route=Route(0, 0))
    fakes.step(2)
    if aborted:
        fakes.engine.abort("again")
    fakes.run()
    for name in ("waits", "elsewhere", *(() if aborted else ("again",))):
        assert client.ids(name) == ECHO.answer(client.sequences[name].request.prompt, 9)
    # The tail of two pages less a token for each worker, however the requests share them.
    assert num_prefilled(fakes) - before <= 5 * 3


def test_a_page_that_is_lost_on_its_way_back_restarts_its_request_alone(caplog):
    caplog.set_level("CRITICAL")
    fakes, client = forgetful()
    bystander = client.ask(prompt=[7] * 60, max_tokens=30)
    fakes.step_until(lambda: len(client.ids(bystander)) > 0)
    gates = [None, Gate(polls=1, error=RuntimeError("lost on the way"))]
    fakes.prefill_stores[0].gate_of = lambda tokens: gates.pop() if gates else None
    before, generation = num_prefilled(fakes), fakes.engine.admission.prefill_pools[0].generation
    client.ask("again", LONGER, max_tokens=9)
    fakes.run()
    assert not gates
    assert client.ids("again") == ECHO.answer(LONGER, 9)
    assert client.ids(bystander) == ECHO.answer([7] * 60, 30)
    assert num_prefilled(fakes) - before == 5
    assert fakes.engine.admission.prefill_pools[0].generation == generation


def test_pages_that_are_always_lost_on_their_way_back_fail_their_request_alone(caplog):
    caplog.set_level("CRITICAL")
    fakes, client = forgetful()
    fakes.prefill_stores[0].gate_of = lambda tokens: Gate(polls=1, error=RuntimeError("lost on the way"))
    client.ask("again", LONGER, max_tokens=9)
    other = client.ask(prompt=[7] * 60, max_tokens=30)
    fakes.run()
    assert client.end("again") == FAILED
    assert client.ids(other) == ECHO.answer([7] * 60, 30)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("num_prefill", [1, 2])
def test_a_pool_may_be_rebuilt_while_pages_return(kind, num_prefill, caplog):
    caplog.set_level("CRITICAL")
    fakes, client = forgetful(num_prefill)
    for store in fakes.prefill_stores:
        store.gate_of = slowly
    returning(fakes, client)
    failing = fakes.prefill[-1] if kind == "prefill" else fakes.decode["t"]

    def once() -> None:
        failing.before = lambda: None
        raise RuntimeError("made to fail")

    failing.before = once
    other = client.ask(prompt=[7] * 20, max_tokens=9, route=Route(num_prefill - 1, 0))
    pools = fakes.engine.admission.prefill_pools if kind == "prefill" else fakes.engine.admission.decode_pools
    fakes.step_until(lambda: pools[-1].generation > 0)
    fakes.run()
    assert client.ids("again") == ECHO.answer(LONGER, 9)
    assert client.ids(other) == ECHO.answer([7] * 20, 9)


def test_pages_do_not_return_to_a_request_that_was_put_aside():
    """An older stream takes its decode pages while they return."""
    fakes, client = forgetful(decode_pages=34)
    fakes.prefill_stores[0].gate_of = lambda tokens: Gate(polls=9)
    client.ask("older", [7] * 9, max_tokens=60)
    returning(fakes, client, 6)
    fakes.step_until(lambda: client.state("again") is State.WAITING)
    fakes.run()
    assert client.ids("older") == ECHO.answer([7] * 9, 60)
    assert client.ids("again") == ECHO.answer(LONGER, 9)


@pytest.mark.parametrize("error", [None, RuntimeError("lost on the way")])
def test_a_sequence_may_lose_its_pages_while_the_prefill_worker_looks_at_their_content(error):
    """The decode worker's thread may put it aside then."""
    fakes, client = forgetful()
    client.ask("again", LONGER, max_tokens=9)
    admission, sequence = fakes.engine.admission, client.sequences["again"]
    fakes.step_until(lambda: bool(admission.returning(0)))

    class Content(Gate):
        def look(self) -> bool:
            admission.put_aside(sequence)
            return True

    admission.returning(0)[0].content.gate = Content(error=error)
    fakes.run()
    assert client.ids("again") == ECHO.answer(LONGER, 9)
    assert admission.num_restarts == 1


def test_a_prompt_goes_to_the_decode_worker_that_has_its_pages_unless_that_is_much_busier():
    fakes, client = forgetful(num_decode=2)
    pools = fakes.engine.admission.decode_pools
    pools[0].manager.flush()
    assert [pool.manager.num_hits(client.sequences["before 1"].keys) for pool in pools] == [0, 24]
    routes = []
    for number in range(10):
        name = client.ask(prompt=[*BEGINNING, 7, 8, 9][: 97 + number % 3], max_tokens=20)
        routes.append(client.sequences[name].decode_worker)
    assert routes[:4] == [1, 1, 1, 1]
    assert 0 in routes
    fakes.run()


def test_many_parts_come_back_between_threads():
    """Nothing else wakes the decode worker for the third part."""
    fakes = make_engine({"t": ECHO}, pages=128)
    client, prefix = Client(fakes), [number % 250 for number in range(96)]
    client.ask("before", [*prefix, 7], max_tokens=1)
    fakes.run()
    fakes.engine.admission.prefill_pools[0].manager.flush()
    for store in (*fakes.prefill_stores, *fakes.decode_stores):
        # The test's thread has stepped them so far.
        store._thread = None
    fakes.engine.start()
    client.ask("again", [*prefix, 1, 2, 3], max_tokens=3)
    limit = time.monotonic() + 10
    while not client.ended("again"):
        assert time.monotonic() < limit, "it waits for pages that nobody sends"
        time.sleep(0.001)
    fakes.engine.stop()
    assert client.ids("again") == ECHO.answer([*prefix, 1, 2, 3], 3)
    assert (client.cached("again"), fakes.faults) == (96, [])
