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
    preempted = admission.preempted

    def note(sequence):
        order.append((names.index(sequence.request.id), [names.index(o.request.id) for o in admission.decoding[0]]))
        preempted(sequence)

    admission.preempted = note
    fakes.run()
    assert len(order) >= 3
    for victim, decoding in order:
        assert victim == max(decoding)
        assert victim > 0
    for number, name in enumerate(names):
        assert client.ids(name) == ECHO.answer([number] * 13, 40)


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
