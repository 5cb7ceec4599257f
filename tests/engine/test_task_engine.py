"""A task is replaced in the engine: live requests keep their old weights, and old and new are never mixed."""

import threading
from typing import Any

import pytest
from fake_engine import Client, make_engine
from serving_fakes import Echo, FakeDecode

from pshare_jax.engine.engine import UnknownTask
from pshare_jax.engine.request import Request
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

OLD, NEW = Echo("old"), Echo("new")


def swap(fakes, task="t", answer=NEW):
    weights = FakeDecode(answer, fakes.faults)
    fakes.engine.put_task(task, {worker.index: weights for worker in fakes.engine.decode_workers})
    return weights


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("place", [{}, {"colocated": True}, {"num_decode": 2}])
def test_old_and_new_ones_are_never_mixed(steps, place):
    """In every state of a request when its task changes: waiting, prefilled, transferred, decoded."""
    fakes = make_engine({"t": OLD}, **place)
    client = Client(fakes)
    prompts = [[number] * (number * 3) for number in range(1, 7)]
    old = [client.ask(prompt=prompt, max_tokens=12) for prompt in prompts]
    fakes.step(steps)
    swap(fakes)
    new = [client.ask(prompt=prompt, max_tokens=12) for prompt in prompts]
    fakes.step(2)
    fakes.engine.put_task("t", {})
    with pytest.raises(UnknownTask, match="no task 't'"):
        client.ask()
    fakes.run()
    for requests, answer in ((old, OLD), (new, NEW)):
        assert [client.ids(name) for name in requests] == [answer.answer(prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("change", ["replace", "remove"])
def test_a_preempted_request_comes_back_to_its_old_weights(change):
    fakes = make_engine({"t": OLD}, pages=15, decode_pages=15)
    client = Client(fakes)
    for token in (1, 2):
        client.ask(f"r{token}", [token] * 21, max_tokens=20)
    fakes.step_until(lambda: client.state("r2") is State.PREEMPTED)
    if change == "replace":
        swap(fakes)
        client.ask("new", [2] * 21, max_tokens=20)
    else:
        fakes.engine.put_task("t", {})
    fakes.run()
    assert fakes.engine.decode_workers[0].num_preempted >= 1
    for token in (1, 2):
        assert client.ids(f"r{token}") == OLD.answer([token] * 21, 20)
    if change == "replace":
        assert client.ids("new") == NEW.answer([2] * 21, 20)


def test_all_choices_of_a_call_have_the_same_weights():
    """A replacement in the middle of a submission waits for its end."""
    fakes = make_engine({"t": OLD}, num_decode=2)
    client, engine = Client(fakes), fakes.engine
    router: Any = engine.router
    began, swapped = threading.Event(), threading.Event()

    def change():
        began.set()
        swap(fakes)
        swapped.set()

    thread = threading.Thread(target=change)
    assign = router.assign

    def slow(*args):
        if not began.is_set():
            thread.start()
            assert began.wait(5)
        # The replacement has the time to happen, and must not.
        assert not swapped.wait(0.05)
        return assign(*args)

    router.assign = slow
    requests = [Request(f"r{number}", "t", (1, 2, 3), 4) for number in range(4)]
    engine.submit_all(requests, [lambda event: None] * 4)
    thread.join()
    sequences = [engine._live[request.id] for request in requests]
    assert {sequence.decode_worker for sequence in sequences} == {0, 1}
    assert len({id(sequence.decode.module) for sequence in sequences}) == 1
    fakes.run()
    assert [sequence.decode.completion_ids for sequence in sequences] == [OLD.answer((1, 2, 3), 4)] * 4
    router.assign = assign
    name = client.ask(prompt=(1, 2, 3), max_tokens=4)
    fakes.run()
    assert client.ids(name) == NEW.answer((1, 2, 3), 4)


def test_a_call_with_an_unknown_task_takes_nothing():
    fakes = make_engine({"t": OLD})
    requests = [Request("a", "t", (1, 2), 4), Request("b", "u", (1, 2), 4)]
    with pytest.raises(UnknownTask):
        fakes.engine.submit_all(requests, [lambda event: None] * 2)
    assert (fakes.engine.num_live, fakes.engine.router.decode_load) == (0, [0])


def test_a_task_goes_only_to_the_workers_it_is_given_to():
    fakes = make_engine({"t": OLD}, num_decode=3)
    weights = FakeDecode(NEW, fakes.faults)
    fakes.engine.put_task("u", {1: weights})
    assert [list(worker.tasks) for worker in fakes.engine.decode_workers] == [["t"], ["t", "u"], ["t"]]
    client = Client(fakes)
    asked = [client.ask(prompt=[n], task="u", max_tokens=3) for n in range(1, 5)]
    fakes.run()
    assert {client.sequences[name].decode_worker for name in asked} == {1}
    assert [client.ids(name) for name in asked] == [NEW.answer([n], 3) for n in range(1, 5)]
    fakes.engine.put_task("u", {0: weights})
    assert [list(worker.tasks) for worker in fakes.engine.decode_workers] == [["t", "u"], ["t"], ["t"]]
