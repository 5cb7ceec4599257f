"""What a request's hint does: pins, ended sessions, parents and prefetches, on fakes with a clock of their own."""

from collections import Counter

import pytest
from fake_engine import PAGE, Client, Load, make_engine, watch_calls
from serving_fakes import Echo

from pshare_jax.engine.config import EngineConfig, KVConfig, check_engine_config
from pshare_jax.engine.request import Hint, Request, check_request
from pshare_jax.engine.sequence import PREFETCH_DELAY, State
from pshare_jax.errors import PshareError

pytestmark = pytest.mark.host

TASKS = {name: Echo(name) for name in "tu"}
PLACES = {"split": {}, "colocated": {"colocated": True}, "two to two": {"num_prefill": 2, "num_decode": 2}}
SESSION = list(range(10, 10 + 12 * PAGE + 1))
FULL = 12 * PAGE


class Agents:
    """An engine of small pools whose clock the test moves."""

    def __init__(self, **settings):
        self.now = 0.0
        self.fakes = make_engine(TASKS, clock=lambda: self.now, **{"pages": 40, **settings})
        self.client, self.engine = Client(self.fakes), self.fakes.engine

    def ask(self, prompt=SESSION, task="t", session: str | None = "s", max_tokens=2, **hint):
        """A request from beginning to end; returns its cached tokens."""
        hint = Hint(**hint) if hint else None
        name = self.client.ask(prompt=prompt, task=task, max_tokens=max_tokens, session=session, hint=hint)
        self.fakes.run()
        return self.client.cached(name)

    def burst(self, num=30):
        """One-off prompts, several pools of them."""
        for number in range(num):
            self.ask([100 + number % 100] * (8 * PAGE) + [number // 100], session=None)

    @property
    def pinned(self):
        return [pool.num_pinned for pool in self.engine.pools]

    @property
    def lapsed(self):
        return sum((pool.cache_stats.num_lapsed for pool in self.engine.pools), start=Counter())

    @property
    def num_prefilled(self):
        return sum(prefill.num_tokens for prefill in self.fakes.prefill)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("seconds", "share", "kept"), [(60, 0.5, True), (None, 0.5, False), (0, 0.5, False), (60, 0.0, False)]
)
def test_a_pinned_session_keeps_its_hits_across_a_burst_of_one_off_prompts(place, seconds, share, kept):
    agents = Agents(pinned_share=share, **PLACES[place])
    assert agents.ask(pin_seconds=seconds) == 0
    agents.burst()
    before = agents.num_prefilled
    assert agents.ask([*SESSION, 7, 8]) == (FULL if kept else 0)
    assert agents.num_prefilled - before == (2 if kept else FULL + 2)
    assert (max(agents.pinned) > 0) == kept


def test_a_pin_expires_and_the_session_is_then_evicted_like_others():
    agents = Agents()
    agents.ask(pin_seconds=60)
    agents.now = 59.9
    assert agents.pinned == [12, 12]
    agents.burst()
    assert agents.ask() == FULL
    agents.now = 60.0
    assert agents.pinned == [0, 0]
    assert agents.lapsed == {"expired": 24}
    agents.burst(60)
    assert agents.ask() == 0


def test_each_request_with_the_hint_renews_the_pin_and_covers_the_grown_prompt():
    agents = Agents()
    for turn in range(4):
        prompt = SESSION[: (3 + turn) * PAGE + 1]
        agents.ask(prompt, pin_seconds=60)
        assert agents.pinned == [3 + turn, 3 + turn]
        agents.now += 40
    agents.ask(pin_seconds=0)
    assert (agents.pinned, agents.lapsed) == ([0, 0], {"replaced": 12})


@pytest.mark.parametrize("place", ["split", "colocated"])
def test_no_more_than_the_share_is_pinned_and_the_oldest_pins_lapse(place):
    agents = Agents(pages=41, pinned_share=0.5, **PLACES[place])
    for number in range(4):
        agents.ask([number] * (8 * PAGE + 1), session=str(number), pin_seconds=60)
        assert all(num <= 20 for num in agents.pinned)
    assert set(agents.pinned) == {16}
    agents.burst()
    cached = [agents.ask([number] * (8 * PAGE + 1), session=str(number)) for number in (3, 2, 1, 0)]
    assert cached == [8 * PAGE, 8 * PAGE, 0, 0]
    # A session that is larger than the share is pinned from its beginning.
    agents.ask([77] * (30 * PAGE + 1), pin_seconds=60)
    assert set(agents.pinned) == {20}


@pytest.mark.parametrize("place", PLACES)
def test_pins_refuse_and_delay_nothing(place):
    agents = Agents(pages=41, pinned_share=1.0, **PLACES[place])
    for number in range(5):
        agents.ask([number] * (8 * PAGE + 1), session=str(number), pin_seconds=60)
    assert max(agents.pinned) >= 39
    largest = agents.engine.facts.max_len
    name = agents.client.ask(prompt=[99] * (largest - 30), max_tokens=30)
    agents.fakes.run()
    assert agents.client.end(name) == "length"
    assert agents.lapsed["pressure"] > 0


@pytest.mark.parametrize("place", ["split", "colocated"])
def test_what_a_running_session_leaves_in_the_prefill_pool_is_pinned_until_its_end(place):
    agents = Agents(pages=60, **PLACES[place])
    name = agents.client.ask(prompt=SESSION, max_tokens=20, session="s", hint=Hint(pin_seconds=5))
    agents.fakes.step_until(lambda: agents.client.state(name) is State.DECODING)
    agents.now = 1000.0
    assert agents.pinned == ([12, 0] if place == "split" else [0])
    agents.fakes.run()
    assert set(agents.pinned) == {12}
    agents.now = 1005.0
    assert set(agents.pinned) == {0}


@pytest.mark.parametrize("place", ["split", "colocated"])
def test_an_ended_session_goes_first_but_for_pages_of_others(place):
    agents = Agents(pages=60, **PLACES[place])
    head, own = SESSION[: 4 * PAGE], [201] * (6 * PAGE)
    agents.ask([*head, *[202] * (8 * PAGE), 1], session="other")
    agents.ask([*head, *own, 1], session="s", pin_seconds=600)
    agents.ask([*head, *own, 1], session="s")
    # The call that ends the session need not have its prompt.
    agents.ask([5], evict=True, prefetch=True)
    assert set(agents.pinned) == {0}
    assert [pool.cache_stats.num_put_first for pool in agents.engine.pools] == [6] * len(agents.engine.pools)
    agents.ask([203] * (46 * PAGE), session=None)
    assert agents.ask([*head, *[202] * (8 * PAGE), 1], session="other") == 12 * PAGE
    assert agents.ask([*head, *own, 1], session="s") <= 5 * PAGE


def test_every_choice_of_the_last_call_may_end_the_session():
    agents = Agents()
    for number in range(2):
        agents.client.ask(f"choice {number}", SESSION, max_tokens=3 + 9 * number, session="s", hint=Hint(evict=True))
    agents.fakes.run()
    assert [pool.cache_stats.num_put_first for pool in agents.engine.pools] == [12, 12]


@pytest.mark.parametrize("in_queue", [True, False])
def test_an_aborted_request_still_ends_its_session(in_queue):
    agents = Agents()
    agents.ask(pin_seconds=60)
    name = agents.client.ask(prompt=SESSION, session="s", hint=Hint(evict=True))
    agents.fakes.step(0 if in_queue else 4)
    agents.engine.abort(name)
    agents.fakes.run()
    assert agents.pinned == [0, 0]
    assert [pool.cache_stats.num_put_first for pool in agents.engine.pools] == [12, 12]


def test_a_request_that_moves_to_another_queue_has_not_ended():
    agents = Agents()
    agents.ask(pin_seconds=60)
    name = agents.client.ask(prompt=SESSION, session="s", hint=Hint(evict=True))
    sequence, admission = agents.client.sequences[name], agents.engine.admission
    admission.take_out(sequence)
    admission.add(sequence)
    assert agents.pinned == [12, 12]
    agents.fakes.run()
    assert agents.pinned == [0, 0]


@pytest.mark.parametrize("place", ["split", "colocated"])
def test_a_childs_pin_keeps_the_pages_of_the_parents_that_wait_for_it(place):
    agents = Agents(pages=80, **PLACES[place])
    prompts = {name: [number] * (6 * PAGE + 1) for number, name in enumerate(("root", "planner", "worker"))}
    agents.ask(prompts["root"], session="root")
    agents.ask(prompts["planner"], session="planner", parent="root")
    agents.ask(prompts["worker"], session="worker", parent="planner", pin_seconds=60)
    assert set(agents.pinned) == {18}
    # The parent's end takes nothing from a child that pins it.
    agents.ask([5], session="planner", evict=True, prefetch=True)
    assert set(agents.pinned) == {18}
    agents.burst(40)
    assert [agents.ask(prompt, session=name) for name, prompt in prompts.items()] == [6 * PAGE] * 3


def test_a_childs_use_makes_its_parents_pages_recent():
    cached = {}
    for parent in ("root", None):
        agents = Agents(pages=45)
        agents.ask(SESSION, session="root")
        agents.ask([5] * (12 * PAGE + 1), session="between")
        agents.ask([6] * PAGE, session="child", parent=parent)
        agents.ask([7] * (24 * PAGE + 1), session=None)
        cached[parent] = agents.ask(SESSION, session="root"), agents.ask([5] * (12 * PAGE + 1), session="between")
    assert cached["root"][0] == FULL > cached["root"][1]
    assert cached[None][0] < FULL


def test_sessions_of_other_tenants_are_others():
    agents = Agents()
    agents.ask(pin_seconds=60)
    for salt in ("", "tenant"):
        agents.client.ask(prompt=[5], session="s", cache_salt=salt, hint=Hint(evict=salt != ""))
    agents.fakes.run()
    assert agents.pinned == [12, 12]


@pytest.mark.parametrize("field", ["session", "cache_salt"])
def test_names_of_any_length_are_not_kept(field):
    """A pool and the router remember thousands of sessions."""
    agents, long = Agents(), "x" * 100_000
    for number in range(3):
        fields = {"session": "s", "hint": Hint(pin_seconds=1, parent=f"p{number}"), field: f"{long}{number}"}
        agents.client.ask(prompt=[number] * (2 * PAGE), max_tokens=2, **fields)
        agents.fakes.run()
    known = [list(pool.manager.sessions._by_name) for pool in agents.engine.pools]
    known.append(list(agents.engine.router._affinity._sessions))
    assert [len(names) for names in known] == [3] * len(known)
    for names in known:
        assert max(len(repr(name)) for name in names) < 1_000


# --- prefetches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("length", [1, PAGE, PAGE + 1, 9 * PAGE + 3])
def test_a_prefetch_computes_full_pages_and_leaves_the_rest_to_the_answer(place, length):
    agents = Agents(**PLACES[place])
    prompt, full = SESSION[:length], (length - 1) // PAGE * PAGE
    assert agents.ask(prompt, session=None, prefetch=True) == 0
    assert agents.num_prefilled == full
    assert not any(worker.num_steps for worker in agents.engine.decode_workers)
    sent = sum(transfer.stats.num_pages for transfer in agents.engine.transfers)
    assert agents.ask(prompt, session=None) == full
    # The answer needs its own tail alone, in the prefill pool and in the decode pool.
    tail = length - 1 - full
    assert agents.num_prefilled == full + tail
    assert sum(transfer.stats.num_pages for transfer in agents.engine.transfers) == sent + (tail > 0) * (
        place != "colocated"
    )
    assert agents.ask(prompt, session=None, prefetch=True) == full


def test_a_prefetch_takes_no_row():
    agents = Agents(rows=1, pages=60)
    name = agents.client.ask(prompt=[1, 2, 3], max_tokens=40)
    agents.fakes.step_until(lambda: len(agents.client.ids(name)) > 2)
    waiting = agents.client.ask(prompt=[4, 5, 6], max_tokens=2)
    prefetch = agents.client.ask(prompt=SESSION, hint=Hint(prefetch=True))
    agents.fakes.step_until(lambda: agents.client.ended(prefetch))
    assert not agents.client.ended(name)
    assert not agents.client.ids(waiting)
    agents.fakes.run()


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("num", [1, 5])
def test_prompts_with_an_answer_pass_prefetches(num, colocated):
    agents = Agents(pages=800, chunk=16, colocated=colocated)
    calls = watch_calls(agents.fakes.prefill_stores[0])
    for number in range(num):
        agents.client.ask(prompt=[200 + number] * 201, hint=Hint(prefetch=True))
    agents.fakes.step(2)
    for number in range(3):
        agents.client.ask(prompt=[number] * (65 if number else 9), max_tokens=1)
    agents.fakes.run()
    order = [call.rows[0][0] for call in calls if call.kind == "prefill"]
    before = order[: max(index for index, token in enumerate(order) if token < 200)]
    assert sum(token >= 200 for token in before) <= 2
    assert order.count(0) == 1


def test_a_prefetch_is_not_put_off_forever():
    agents = Agents(pages=800, chunk=16, rows=16)
    load = Load(agents.client, 6, length=60, max_tokens=1)
    for _ in range(20):
        load.ask_again()
        agents.fakes.step()
    prefetch, before = agents.client.ask(prompt=[250] * 201, hint=Hint(prefetch=True)), load.num_answers
    while not agents.client.ended(prefetch):
        load.ask_again()
        agents.fakes.step()
    assert 20 < load.num_answers - before < 3 * PREFETCH_DELAY
    agents.fakes.run()


def test_a_request_that_waits_for_a_prefetchs_pages_brings_it_forward():
    agents = Agents(pages=800, chunk=16)
    agents.client.ask(prompt=SESSION, hint=Hint(prefetch=True))
    agents.fakes.step(1)
    waits = agents.client.ask(prompt=SESSION, max_tokens=1)
    others = [agents.client.ask(prompt=[number] * 65, max_tokens=1) for number in range(3)]
    agents.fakes.step_until(lambda: agents.client.ended(waits))
    assert not any(agents.client.ended(name) for name in others)
    agents.fakes.run()


def test_an_aborted_prefetch_leaves_its_work_to_those_that_wait():
    agents = Agents(chunk=8)
    prefetch = agents.client.ask(prompt=SESSION, hint=Hint(prefetch=True))
    agents.fakes.step(2)
    waits = agents.client.ask(prompt=SESSION, max_tokens=3)
    agents.fakes.step(1)
    agents.engine.abort(prefetch)
    agents.fakes.run()
    assert agents.client.ids(waits) == TASKS["t"].answer(SESSION, 3)


# --- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "fields", "word"),
    [
        (Hint(pin_seconds=-1), {"session": "s"}, "pin_seconds"),
        (Hint(pin_seconds=1e9), {"session": "s"}, "pin_seconds"),
        (Hint(pin_seconds=float("nan")), {"session": "s"}, "pin_seconds"),
        (Hint(pin_seconds=1), {}, "session"),
        (Hint(evict=True), {"session": ""}, "session"),
        (Hint(prefetch=True), {"scores_prompt": True}, "prefetch"),
    ],
)
def test_hints_that_do_not_fit_are_refused(hint, fields, word):
    request = Request("r", "t", (1, 2), 1, hint=hint, **fields)
    with pytest.raises(PshareError, match=word):
        check_request(request, 10, 10)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_the_share_is_checked(share):
    with pytest.raises(PshareError, match=r"kv\.pinned_share"):
        check_engine_config(EngineConfig(tasks={"t": "base"}, kv=KVConfig(pinned_share=share)))
