"""A decode pool that is too small for all: the youngest is preempted and resumed, and no answer changes."""

import pytest
from fake_engine import PAGE, Client, make_engine
from serving_fakes import Echo

from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("length", range(16, 22))
@pytest.mark.parametrize("moves", [(1,), (2, 8)])
def test_answers_are_the_same(length, colocated, moves):
    """Case A2-17, small: two requests, a pool that cannot hold both to their ends."""
    fakes = make_engine({"t": ECHO}, pages=15, decode_pages=15, colocated=colocated, moves=moves)
    client = Client(fakes)
    prompts = {"old": [1] * length, "young": [2] * length}
    for name, prompt in prompts.items():
        client.ask(name, prompt, max_tokens=20)
    fakes.run()
    assert fakes.engine.decode_workers[0].num_preempted >= 1
    for name, prompt in prompts.items():
        assert client.ids(name) == ECHO.answer(prompt, 20)
        # A resumed request hits its own pages; these hits are not counted as the request's.
        assert client.cached(name) == 0
        assert [event.completion_tokens for event in client.events[name]] == list(range(1, 21))


def test_generated_tokens_are_never_prefilled():
    fakes = make_engine({"t": ECHO}, pages=64, decode_pages=15)
    client = Client(fakes)
    for token in (1, 2):
        client.ask(prompt=[token] * 21, max_tokens=20)
    fakes.run()
    assert fakes.engine.decode_workers[0].num_preempted >= 1
    assert {token for chunk in fakes.prefill[0].chunks for token in chunk} == {1, 2}
    # The prefill pool still had the full pages: nothing was computed twice.
    assert fakes.prefill[0].num_tokens == 40


def test_a_base_page_that_was_evicted_meanwhile_is_prefilled_again():
    fakes = make_engine({"t": ECHO}, pages=15, decode_pages=15)
    client = Client(fakes)
    for token in (1, 2):
        client.ask(prompt=[token] * 21, max_tokens=20)
    fakes.step_until(lambda: fakes.engine.decode_workers[0].num_preempted == 1)
    fakes.prefill_stores[0].pages[:] = -1
    fakes.engine.prefill_workers[0].pool.manager.flush()
    fakes.engine.decode_workers[0].pool.manager.flush()
    fakes.run()
    assert fakes.prefill[0].num_tokens == 60
    for name in client.events:
        assert client.ids(name) == ECHO.answer(client.sequences[name].request.prompt, 20)


def test_the_oldest_is_never_preempted_and_the_youngest_first():
    fakes = make_engine({"t": ECHO}, decode_pages=21)
    client = Client(fakes)
    names = [client.ask(prompt=[number] * 13, max_tokens=40) for number in range(4)]
    order = []
    admission = fakes.engine.admission
    put_aside = admission.put_aside

    def note(sequence):
        holders = admission.holders(admission.decode_pools[0])
        order.append((names.index(sequence.request.id), [names.index(other.request.id) for other in holders]))
        put_aside(sequence)

    admission.put_aside = note
    fakes.run()
    assert len(order) >= 3
    for victim, holders in order:
        assert victim == max(holders)
        assert victim > 0
    assert fakes.engine.decode_workers[0].num_preempted == len(order)
    for number, name in enumerate(names):
        assert client.ids(name) == ECHO.answer([number] * 13, 40)


@pytest.mark.parametrize(
    ("state", "colocated"), [(State.PREFILLING, False), (State.PREFILLING, True), (State.TRANSFERRING, False)]
)
def test_the_youngest_gives_its_pages_in_any_state(state, colocated):
    """A sequence that has not begun to decode holds pages that an older answer needs: it gives them at once."""
    fakes = make_engine(
        {"t": ECHO}, pages=19, decode_pages=19, colocated=colocated, chunk=3 if state is State.PREFILLING else 64
    )
    client = Client(fakes)
    gate = fakes.hold(2)
    client.ask("old", [1] * 5, max_tokens=60)
    fakes.step_until(lambda: len(client.ids("old")) == 4)
    # Its reservation leaves a page for each of the two and no more.
    client.ask("young", [2] * 51, max_tokens=3)
    fakes.step_until(lambda: client.state("young") is state)
    held = len(client.ids("old"))
    fakes.step_until(lambda: client.state("young") is State.WAITING)
    young = client.sequences["young"]
    assert (young.prefill.table, young.decode.table) == (None, None)
    assert fakes.engine.decode_workers[0].num_preempted == 0
    # The old answer has a token in every turn.
    made = len(client.ids("old"))
    assert made > held
    gate.open = True
    fakes.run()
    assert client.ids("old") == ECHO.answer([1] * 5, 60)
    assert client.ids("young") == ECHO.answer([2] * 51, 3)


def test_a_preempted_request_holds_nothing_on_the_devices():
    fakes = make_engine({"t": ECHO}, decode_pages=15)
    client = Client(fakes)
    client.ask("old", [1] * 21, max_tokens=30)
    client.ask("young", [2] * 21, max_tokens=30)
    fakes.step_until(lambda: client.state("young") is State.PREEMPTED)
    young = client.sequences["young"]
    assert (young.prefill.table, young.decode.table) == (None, None)
    assert young.decode.saved is not None
    # The tail page and the generated tokens' pages; the base recomputes the full pages.
    num_kv = len(young.request.prompt) + len(young.decode.completion_ids) - 1
    assert sum(len(part) for part in young.decode.saved.parts) == -(-num_kv // PAGE) - 20 // PAGE
    fakes.check()
    fakes.run()
    assert young.decode.saved is None


def test_one_alone_fills_the_whole_pool():
    fakes = make_engine({"t": ECHO}, pages=9, decode_pages=9)
    client = Client(fakes)
    client.ask("a", [1] * 5, max_tokens=27)
    fakes.run()
    assert client.ids("a") == ECHO.answer([1] * 5, 27)
    assert fakes.engine.decode_workers[0].num_preempted == 0


def test_preempted_while_its_neighbours_share_its_prompt():
    fakes = make_engine({"t": ECHO, "u": Echo("u")}, decode_pages=15)
    client = Client(fakes)
    for task in "tutu":
        client.ask(prompt=[1] * 21, max_tokens=20, task=task)
    fakes.run()
    assert fakes.engine.decode_workers[0].num_preempted >= 1
    for name in client.events:
        assert client.ids(name) == Echo(client.sequences[name].request.task).answer([1] * 21, 20)
