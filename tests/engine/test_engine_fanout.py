"""Simultaneous equal prompts: one prefill and one transfer for all, also when their producer ends early."""

import pytest
from fake_engine import PAGE, Client, make_engine
from serving_fakes import Echo, Gate

from pshare_jax.engine.request import FAILED
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

TASKS = {name: Echo(name) for name in "tuvw"}
PROMPT = list(range(10, 45))
FULL = (len(PROMPT) - 1) // PAGE * PAGE
TAIL = len(PROMPT) - 1 - FULL


def ask_all(client, prompt=PROMPT, tasks="tuvw", max_tokens=6):
    return [client.ask(task, prompt, task, max_tokens=max_tokens) for task in tasks]


def check_answers(client, names, prompt=PROMPT):
    for name in names:
        assert client.ids(name) == TASKS[name].answer(prompt, 6)


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("apart", [0, 1, 2, 5])
def test_equal_prompts_are_prefilled_and_copied_once(colocated, apart):
    """At the same instant, or while the first is prefilled, transferred or decoded."""
    fakes = make_engine(TASKS, chunk=8, colocated=colocated)
    client = Client(fakes)
    for task in "tuvw":
        client.ask(task, PROMPT, task, max_tokens=6)
        fakes.step(apart)
    fakes.run()
    check_answers(client, "tuvw")
    assert fakes.prefill[0].num_tokens == len(PROMPT) - 1 + 3 * TAIL
    assert [client.cached(name) for name in "tuvw"] == [0, FULL, FULL, FULL]
    # Tokens fed = prompt - 1 - cached, summed over requests.
    assert fakes.prefill[0].num_tokens == sum(len(PROMPT) - 1 - client.cached(name) for name in "tuvw")
    if not colocated:
        assert fakes.engine.transfers[0].stats.num_pages == FULL // PAGE + 4
    assert fakes.engine.admission.num_restarts == 0


def test_a_prompt_of_full_pages_leaves_nothing_to_the_others():
    prompt = PROMPT[: FULL + 1]
    fakes = make_engine(TASKS)
    client = Client(fakes)
    ask_all(client, prompt)
    fakes.run()
    check_answers(client, "tuvw", prompt)
    assert fakes.prefill[0].num_tokens == FULL
    assert fakes.engine.transfers[0].stats.num_pages == FULL // PAGE
    assert [client.cached(name) for name in "tuvw"] == [0, FULL, FULL, FULL]


def test_pages_that_one_decode_worker_has_are_copied_to_the_other_from_the_cache():
    fakes = make_engine(TASKS, num_decode=2)
    client = Client(fakes)
    ask_all(client, tasks="tu")
    fakes.run()
    assert fakes.prefill[0].num_tokens == len(PROMPT) - 1 + TAIL
    assert [transfer.stats.num_pages for transfer in fakes.engine.transfers] == [FULL // PAGE + 1] * 2
    check_answers(client, "tu")


def test_the_copy_goes_on_while_the_rest_is_prefilled():
    fakes = make_engine(TASKS, chunk=8)
    client = Client(fakes)
    client.ask("t", PROMPT)
    fakes.step(2)
    assert client.state("t") is State.PREFILLING
    assert fakes.engine.transfers[0].stats.num_pages == 4


def test_salts_part_what_would_be_shared():
    """Case A2-09, both halves: the same salt hits, another salt misses."""
    fakes = make_engine(TASKS)
    client = Client(fakes)
    cached = []
    for salt in ("a", "b", "a", "", "b"):
        cached.append(client.ask(prompt=PROMPT, max_tokens=2, cache_salt=salt))
        fakes.run()
    assert [client.cached(name) for name in cached] == [0, 0, FULL, 0, FULL]


@pytest.mark.parametrize("other_first", [False, True])
def test_generated_pages_are_never_hit(other_first):
    """Case A2-04: D_a's text in D_b's prompt is prefilled anew, and the prompt's own pages still hit."""
    fakes = make_engine(TASKS)
    client = Client(fakes)
    first, second = ("u", "t") if other_first else ("t", "u")
    client.ask("one", PROMPT, first, max_tokens=3 * PAGE)
    fakes.run()
    turn = [*PROMPT, *client.ids("one"), 5]
    client.ask("two", turn, second, max_tokens=5)
    client.ask("three", PROMPT, second, max_tokens=5)
    fakes.run()
    assert client.ids("two") == TASKS[second].answer(turn, 5)
    assert client.ids("three") == TASKS[second].answer(PROMPT, 5)
    assert (client.cached("two"), client.cached("three")) == (FULL, FULL)


# --- the producer ends early -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("steps", range(1, 6))
def test_the_prefilling_owner_is_aborted_and_the_others_start_anew(colocated, steps):
    fakes = make_engine(TASKS, chunk=8, colocated=colocated)
    client = Client(fakes)
    ask_all(client)
    fakes.step(steps)
    assert client.sequences["t"].prefill.num_prefilled == min(8 * steps, len(PROMPT) - 1)
    fakes.engine.abort("t")
    fakes.run()
    check_answers(client, "uvw")
    if steps < 4:
        # What was written and published is not computed again; one request of the three computes the rest.
        assert fakes.engine.admission.num_restarts == 3
    assert fakes.prefill[0].num_tokens == FULL + (3 if steps < 5 else 4) * TAIL
    # Hits are counted once, as they were when the request was first admitted.
    assert [client.cached(name) for name in "uvw"] == [FULL] * 3
    assert fakes.engine.decode_workers[0].pool.cache_stats.num_requests == (4 if colocated else 0)


def test_a_copy_that_others_wait_for_outlives_its_request():
    fakes = make_engine(TASKS, chunk=64, moves=(32,))
    gate = fakes.hold(PROMPT[0])
    client = Client(fakes)
    ask_all(client)
    fakes.step_until(lambda: all(client.state(name) is State.TRANSFERRING for name in "tuvw"))
    fakes.engine.abort("t")
    fakes.step(3)
    admission = fakes.engine.admission
    assert (admission.num_adopted, admission.num_restarts) == (1, 0)
    assert not any(client.events[name] for name in "uvw")
    fakes.engine.admission.check()
    gate.open = True
    fakes.run()
    check_answers(client, "uvw")
    assert fakes.prefill[0].num_tokens == len(PROMPT) - 1 + 3 * TAIL
    assert admission.num_restarts == 0


def test_several_copies_outlive_their_request_in_order():
    """Two transfers of one request; the second arrives first."""
    fakes = make_engine(TASKS, moves=(4,))
    store = fakes.decode_stores[0]
    first, second = Gate(), Gate()
    store.gates = {PROMPT[0]: first, PROMPT[4 * PAGE]: second}
    client = Client(fakes)
    ask_all(client)
    fakes.step(10)
    fakes.engine.abort("t")
    second.open = True
    fakes.step(5)
    assert fakes.engine.admission.num_adopted == 2
    assert fakes.engine.admission.num_restarts == 0
    first.open = True
    fakes.run()
    check_answers(client, "uvw")


def test_a_copy_that_nobody_waits_for_any_more_is_dropped():
    fakes = make_engine(TASKS)
    fakes.hold(PROMPT[0])
    client = Client(fakes)
    ask_all(client, tasks="tu")
    fakes.step(10)
    fakes.engine.abort("t")
    fakes.step(2)
    assert fakes.engine.admission.num_adopted >= 1
    fakes.engine.abort("u")
    # It may still arrive, but no request needs it.
    fakes.step(3)
    assert fakes.engine.idle
    fakes.check()


@pytest.mark.parametrize("aborted", [False, True])
def test_a_failed_copy_sends_the_others_to_make_their_own(aborted, caplog):
    fakes = make_engine(TASKS, moves=(32,))
    gate = fakes.hold(PROMPT[0], error=RuntimeError("lost on the way"))
    client = Client(fakes)
    ask_all(client)
    fakes.step(10)
    if aborted:
        fakes.engine.abort("t")
        fakes.step(2)
    fakes.decode_stores[0].gates.clear()
    gate.open = True
    fakes.run()
    # A transfer may fail once without harm to its own request, too.
    assert client.end("t") == ("abort" if aborted else "length")
    check_answers(client, "uvw" if aborted else "tuvw")
    assert fakes.engine.transfers[0].stats.failures == 1
    assert fakes.engine.admission.num_restarts == (3 if aborted else 4)
    # The prefill pool still had all full pages: only tails are computed again.
    assert fakes.prefill[0].num_tokens == len(PROMPT) - 1 + (6 if aborted else 7) * TAIL


def test_a_copy_that_fails_twice_fails_its_request_alone(caplog):
    fakes = make_engine(TASKS, moves=(32,))
    polls = [Gate(polls=2, error=RuntimeError("lost on the way")) for _ in range(2)]
    fakes.decode_stores[0].gate_of = lambda tokens: polls.pop() if polls and PROMPT[0] in tokens else None
    client = Client(fakes)
    ask_all(client)
    fakes.run()
    assert (client.end("t"), client.events["t"][-1].retry) == (FAILED, None)
    check_answers(client, "uvw")
    assert fakes.engine.transfers[0].stats.failures == 2


def test_a_chain_of_waiters():
    """A longer prompt waits for a shorter one's pages and others for its own: the first request's abort reaches all."""
    longer = [*PROMPT[: FULL + 1], *range(100, 106)]
    fakes = make_engine(TASKS, chunk=8)
    client = Client(fakes)
    client.ask("t", PROMPT, "t", max_tokens=6)
    client.ask("u", longer, "u", max_tokens=6)
    client.ask("v", longer, "v", max_tokens=6)
    fakes.step(1)
    fakes.engine.abort("t")
    fakes.run()
    check_answers(client, "uv", longer)
    assert fakes.engine.admission.num_restarts == 2
    tail = (len(longer) - 1) % PAGE
    assert fakes.prefill[0].num_tokens == len(longer) - 1 + tail
