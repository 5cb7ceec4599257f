"""router.py: sessions and conversations stay with their KV, prompts do not crowd on a worker, loads return to zero."""

import random
from collections import OrderedDict
from itertools import pairwise

import pytest
from fake_engine import make_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.engine import router as routing
from pshare_jax.engine.kv.keys import page_keys
from pshare_jax.engine.request import Request
from pshare_jax.engine.router import OVERLOAD, SLACK_TOKENS, Policy, Route, Router
from pshare_jax.errors import PshareError
from pshare_jax.share.boundary import base_len

pytestmark = pytest.mark.host

PAGE = 16
TASKS = ("plan", "code", "test", "sum")
NUM_SESSIONS, TURNS = 40, 5
# The session keys that clients give to the conversation with this number.
SESSION_KEYS = {"keys": "session {}".format, "no-keys": lambda number: None, "one-key": lambda number: "user"}


def context_of(prompt):
    """The tokens of it that the base encodes."""
    return prompt[: base_len(len(prompt))]


class World:
    """A router over prefill workers whose prefix caches have room for `room` pages; counts the tokens that each encodes."""

    def __init__(self, num_prefill=2, policy: Policy = "prefix", num_decode=1, prefill_tasks=None, room=1_000_000):
        self.router = Router(num_prefill, [TASKS] * num_decode, policy, PAGE, prefill_tasks)
        self.room = room
        self.caches = [OrderedDict() for _ in range(num_prefill)]
        self.encoded = [0] * num_prefill
        self.num_pages = self.num_hits = 0
        self.asked = []

    def hits(self, worker, keys):
        return next((i for i, key in enumerate(keys) if key.digest not in self.caches[worker]), len(keys))

    def assign(self, prompt, session=None, task="plan", known=()):
        keys = page_keys("base", "", context_of(prompt), PAGE, known)
        self.asked = []

        def cached_pages(worker):
            self.asked.append(worker)
            return self.hits(worker, keys)

        return self.router.assign(task, session, base_len(len(prompt)), keys, cached_pages)

    def finish(self, ticket):
        """Prefills and ends a request; returns the number of cached pages."""
        worker = ticket.route.prefill
        hits = self.hits(worker, ticket.keys)
        self.encoded[worker] += ticket.context_len - PAGE * hits
        self.num_pages += len(ticket.keys)
        self.num_hits += hits
        self.cache(worker, ticket.keys)
        self.router.prefilled(ticket, ticket.context_len)
        self.router.release(ticket)
        return hits

    def cache(self, worker, keys):
        """Least recently used: ends of prompts leave before their beginnings."""
        cache = self.caches[worker]
        for key in reversed(keys):
            cache[key.digest] = None
            cache.move_to_end(key.digest)
        while len(cache) > self.room:
            cache.popitem(last=False)

    def ask(self, prompt, session=None, task="plan"):
        """Runs one request on an otherwise idle engine; returns its prefill worker."""
        ticket = self.assign(prompt, session, task)
        self.finish(ticket)
        return ticket.route.prefill

    @property
    def ratio(self):
        return max(self.encoded) / max(min(self.encoded), 1)


class Talk:
    """A session: its growing context, and the number of calls that hit everything that an earlier call had encoded."""

    def __init__(self, system, rng, agents):
        self.rng, self.agents = rng, agents
        self.context = [*system, *self.words(5 * PAGE)]
        self.keys = []  # of the context, to save time
        self.num_calls = TURNS * (len(TASKS) if agents else 1)
        self.done = self.num_hits = self.own_pages = 0
        self.running = False
        self.workers = []

    def words(self, num):
        return [self.rng.randrange(32_000) for _ in range(num)]

    def next_call(self):
        """The next prompt and task: agents are called in turn, each with a final instruction that is not kept."""
        self.keys = page_keys("base", "", context_of(self.context), PAGE, self.keys)
        if not self.agents:
            return self.context, "plan"
        return [*self.context, *self.words(32)], TASKS[self.done % len(TASKS)]

    def answered(self, hits, worker):
        self.num_hits += self.own_pages > 0 and hits >= self.own_pages
        self.own_pages = (len(self.context) - 1) // PAGE
        self.context += self.words(16 + 64)
        self.done += 1
        self.running = False
        self.workers.append(worker)

    @property
    def hit_rate(self):
        return self.num_hits / self.num_calls

    @property
    def num_moves(self):
        return sum(first != second for first, second in pairwise(self.workers))


def talk_all(world, agents, session_key, outstanding, seed, system_pages=10):
    """Case A3-20: sessions that share a system prompt, interleaved at random, with a bounded number of outstanding requests."""
    rng = random.Random(seed)
    system = [rng.randrange(32_000) for _ in range(system_pages * PAGE)]
    talks = [Talk(system, rng, agents) for _ in range(NUM_SESSIONS)]
    running = []
    while any(talk.done < talk.num_calls for talk in talks):
        idle = [talk for talk in talks if not talk.running and talk.done < talk.num_calls]
        full = len(running) == outstanding or not idle
        if running and (full or rng.random() < 0.3):
            talk, ticket = running.pop(rng.randrange(len(running)))
            talk.answered(world.finish(ticket), ticket.route.prefill)
        else:
            talk = rng.choice(idle)
            prompt, task = talk.next_call()
            session = session_key(talks.index(talk))
            running.append((talk, world.assign(prompt, session, task, talk.keys)))
            talk.running = True
    return talks


@pytest.mark.parametrize("outstanding", [1, 16])
@pytest.mark.parametrize("session_key", SESSION_KEYS.values(), ids=SESSION_KEYS)
@pytest.mark.parametrize("agents", [False, True], ids=["chat", "agents"])
def test_sessions_keep_their_kv_and_share_the_workers(agents, session_key, outstanding):
    world = World(2)
    talks = talk_all(world, agents, session_key, outstanding, 0)
    assert min(talk.hit_rate for talk in talks) >= (TURNS - 1) / TURNS
    assert world.ratio <= 1.5
    if outstanding == 1:
        assert sum(talk.num_moves for talk in talks) == 0
    assert world.router.prefill_load == [0, 0]
    assert world.router.decode_load == [0]


@pytest.mark.parametrize("num_prefill", [1, 3])
def test_sessions_on_one_and_on_three_workers(num_prefill):
    for session_key in SESSION_KEYS.values():
        world = World(num_prefill)
        talks = talk_all(world, True, session_key, 16, 1)
        assert min(talk.hit_rate for talk in talks) >= (TURNS - 1) / TURNS
        assert world.ratio <= 1.5


@pytest.mark.parametrize("outstanding", [1, 4, 16])
@pytest.mark.parametrize("agents", [False, True], ids=["chat", "agents"])
def test_one_session_key_for_all_conversations_costs_no_hits_and_idles_no_worker(agents, outstanding):
    """Clients that set `user` to a constant. Four agents outstanding: 0.57 of all pages hit, and 0.34 without a worker
    when the key chose the worker.
    """
    worlds = {}
    for name, session_key in SESSION_KEYS.items():
        world = worlds[name] = World(4, room=300)
        talk_all(world, agents, session_key, outstanding, 0)
        assert world.ratio <= 1.5
    hit_rate = {name: world.num_hits / world.num_pages for name, world in worlds.items()}
    assert min(hit_rate["keys"], hit_rate["one-key"]) >= hit_rate["no-keys"] - 0.03, hit_rate


def test_short_prompts_of_one_session_idle_no_worker():
    world = World(4)
    for number in range(200):
        world.ask([number] * 5, "user")
    assert world.ratio <= 1.5


def test_the_other_policies_lose_what_the_first_keeps():
    """The measures of case A3-20 detect a bad policy."""
    talks = talk_all(World(2, "round_robin"), False, SESSION_KEYS["keys"], 1, 0)
    assert min(talk.hit_rate for talk in talks) < 0.5
    world = World(2, "least_loaded")
    talk_all(world, False, SESSION_KEYS["keys"], 1, 0)
    assert world.encoded[1] == 0


def test_a_long_system_prompt_is_copied_once_the_work_behind_it_pays_for_it():
    world = World(2)
    talks = talk_all(world, True, SESSION_KEYS["no-keys"], 1, 2, system_pages=250)
    assert sum(talk.num_moves for talk in talks) == 0
    assert world.ratio <= 2
    assert sum(world.encoded) < 1.1 * (250 * PAGE + NUM_SESSIONS * (80 + 20 * (80 + 32)))


def prompt_of(num_pages, start=0, tail=1):
    return list(range(start, start + num_pages * PAGE + tail))


def test_a_lone_conversation_never_moves():
    rng = random.Random(0)
    world, context = World(2), prompt_of(2)
    for _ in range(150):
        instruction = [rng.randrange(32_000) for _ in range(100)]
        assert world.ask([*context, *instruction]) == 0
        context += [rng.randrange(32_000) for _ in range(20)]


def test_a_session_is_one_for_all_tasks():
    world = World(3)
    world.ask(prompt_of(9, 5000))
    context = prompt_of(3)
    workers = []
    for turn in range(3):
        for task in TASKS:
            workers.append(world.ask(context, "s", task))
            context = [*context, *prompt_of(2, 1000 * turn)]
    assert set(workers) == {1}


def test_the_cache_outweighs_a_session_key():
    world = World(2)
    assert world.ask(prompt_of(4), "s") == 0
    world.cache(1, page_keys("base", "", context_of(prompt_of(8)), PAGE))
    assert world.assign(prompt_of(8), "s").route.prefill == 1
    assert sorted(world.asked) == [0, 1]


@pytest.mark.parametrize(("session", "worker"), [("b", 1), (None, 0)])
def test_a_session_key_breaks_ties_and_no_more(session, worker):
    world = World(2)
    assert [world.ask(prompt_of(4, 1000), "a"), world.ask(prompt_of(4, 2000), "b")] == [0, 1]
    assert world.ask(prompt_of(4, 3000), session) == worker
    assert world.ask(prompt_of(4, 4000), session) == 1 - worker


def test_an_empty_session_key_is_none():
    world = World(2)
    assert [world.ask(prompt_of(4, start), "") for start in (0, 1000)] == [0, 1]


def test_equal_prompts_at_one_instant_meet_on_one_worker():
    world = World(2)
    tickets = [world.assign(prompt_of(20, tail=32), task=task) for task in TASKS]
    assert [ticket.route.prefill for ticket in tickets] == [0] * 4
    assert [ticket.outstanding for ticket in tickets] == [20 * PAGE + 31] + [15] * 3
    # The producer has ended, but others will compute the same pages; then no request will.
    world.router.release(tickets.pop(0))
    tickets.append(world.assign(prompt_of(20, tail=32)))
    assert tickets[-1].outstanding == 15
    for ticket in tickets:
        world.router.prefilled(ticket, ticket.context_len)
    assert world.assign(prompt_of(20, tail=32)).outstanding == 20 * PAGE + 31


@pytest.mark.parametrize("session", ["hot", None])
def test_one_hot_session_cannot_overload_a_worker_while_the_other_idles(session):
    world, rng = World(2), random.Random(3)
    context = [rng.randrange(32_000) for _ in range(20 * PAGE)]
    world.ask(context, session)
    for _ in range(200):
        prompt = [*context, *(rng.randrange(32_000) for _ in range(10 * PAGE))]
        world.assign(prompt, session)
        low, high = sorted(world.router.prefill_load)
        assert high <= OVERLOAD * (low + len(prompt)) + SLACK_TOKENS
    assert min(world.router.prefill_load) > 10_000


@pytest.mark.parametrize("session", ["s", None])
def test_a_session_leaves_an_overloaded_worker_and_stays_where_it_went(session):
    world = World(2)
    context = prompt_of(4)
    assert world.ask(context, session) == 0
    for tokens, worker in ((SLACK_TOKENS, 0), (200, 1)):
        busy = world.router.take(Route(0, 0), base_len(tokens))
        assert world.ask([*context, *prompt_of(1, 9000)], session) == worker
    world.router.release(busy)
    assert world.ask([*context, *prompt_of(2, 9000)], session) == 1
    assert world.router.prefill_load == [SLACK_TOKENS - 1, 0]


def test_of_two_copies_the_less_loaded_and_of_two_quick_workers_the_less_used():
    world, prompt = World(3), prompt_of(40)
    for worker, tokens in ((0, 1000), (1, 900)):
        world.cache(worker, page_keys("base", "", context_of(prompt), PAGE))
        world.router.take(Route(worker, 0), tokens)
    assert world.ask(prompt) == 1
    world = World(3)
    assert [world.ask(prompt), world.ask(prompt_of(4, 5000))] == [0, 1]
    world.router.take(Route(0, 0), 3000)
    assert world.ask([*prompt, *prompt_of(1, 9000)]) == 2


def test_cached_pages_are_no_load():
    world = World(2)
    for start in (0, 4000):
        world.ask(prompt_of(100, start), "big")
    assert world.router.prefill_load == [0, 0]
    assert world.assign(prompt_of(100), "big").outstanding == 0


def test_a_worker_that_may_not_take_the_task_is_not_chosen():
    world = World(3, prefill_tasks=[{"plan"}, {"code", "test"}, {"code", "test"}])
    world.router.take(Route(2, 0), 5000)
    assert [world.ask(prompt_of(4, 1000 * i), task=task) for i, task in enumerate(["plan", "code", "test"])] == [
        0,
        1,
        1,
    ]
    with pytest.raises(PshareError, match=r"prefill .*'sum'"):
        world.assign(prompt_of(2), task="sum")


@pytest.mark.parametrize("policy", ["prefix", "round_robin", "least_loaded"])
def test_a_prefill_worker_for_each_task(policy):
    """The isolated baseline: a session's tasks do not move each other's home worker."""
    world = World(4, policy, prefill_tasks=[{task} for task in TASKS])
    for _ in range(3):
        assert [world.ask(prompt_of(4), "s", task) for task in TASKS] == [0, 1, 2, 3]


def test_a_session_has_a_place_in_each_group_of_workers():
    world = World(4, prefill_tasks=[{"plan"}, {"plan"}, {"code"}, {"code"}])
    world.ask(prompt_of(9, 5000))
    world.ask(prompt_of(9, 5000), task="code")
    for _ in range(3):
        assert [world.ask(prompt_of(4), "s", task) for task in ("plan", "code")] == [1, 3]


def test_a_session_does_not_follow_its_place_to_a_worker_that_may_not_take_the_task():
    world = World(3, prefill_tasks=[{"plan", "code"}, {"plan"}, {"code"}])
    world.ask(prompt_of(9, 5000))
    assert world.ask(prompt_of(4), "s") == 1
    assert world.ask(prompt_of(4), "s", "code") == 2


def test_work_of_long_ago_is_forgotten():
    world = World(2)
    assert world.ask(prompt_of(1000)) == 0
    workers = [world.ask([20_000 + index] * (2 * PAGE)) for index in range(400)]
    assert set(workers[:100]) == {1}
    assert workers[-100:].count(0) in range(40, 60)


def test_round_robin_takes_turns_and_least_loaded_the_least_tokens():
    world = World(3, "round_robin")
    assert [world.assign(prompt_of(4), "s").route.prefill for _ in range(5)] == [0, 1, 2, 0, 1]
    assert world.asked == []
    world = World(2, "round_robin", prefill_tasks=[{"plan", "code"}, {"plan"}])
    assert [world.ask([1], task=task) for task in ("plan", "code", "plan", "code", "plan")] == [0, 0, 1, 0, 0]
    world = World(3, "least_loaded")
    assert [world.assign(prompt_of(pages), "s").route.prefill for pages in (9, 4, 4, 1, 1, 1)] == [0, 1, 2, 1, 2, 1]
    assert world.asked == []


def test_the_decode_worker_is_the_first_with_the_fewest_requests_that_serves_the_task():
    router = Router(1, [["t"], ["t", "u"], ["u"]], "prefix", PAGE)
    tickets = [router.assign(task, None, 1, (), lambda worker: 0) for task in "ttuut"]
    assert [ticket.route.decode for ticket in tickets] == [0, 1, 2, 1, 0]
    router.release(tickets[1])
    router.release(tickets[3])
    assert router.assign("t", "s", 5000, (), lambda worker: 0).route == Route(0, 1)
    assert router.decode_load == [2, 1, 1]
    with pytest.raises(PshareError, match=r"decode .*'v'"):
        router.assign("v", None, 1, (), lambda worker: 0)
    assert router.decode_load == [2, 1, 1]


@pytest.mark.parametrize("policy", ["prefix", "round_robin", "least_loaded"])
def test_a_dead_worker_is_left_out_while_another_serves_the_task(policy):
    world = World(3, policy, num_decode=2, prefill_tasks=[TASKS, TASKS, ("sum",)])
    prompt = prompt_of(4)
    first = world.assign(prompt, "s").route
    assert first == Route(0, 0)
    for _ in range(2):
        world.router.leave_out("prefill", 0)
        world.router.leave_out("decode", 0)
    assert [world.assign(prompt, "s").route for _ in range(3)] == [Route(1, 1)] * 3
    world.router.leave_out("decode", 1)
    world.router.leave_out("prefill", 1)
    routes = {world.assign(prompt_of(4, 1000 * number)).route for number in range(8)}
    assert {route.prefill for route in routes} == {route.decode for route in routes} == {0, 1}
    assert world.assign(prompt, "s", "sum").route.prefill == 2
    world.router.bring_back("prefill", 0)
    world.router.bring_back("decode", 1)
    assert [world.assign(prompt, "s").route for _ in range(3)] == [Route(0, 1)] * 3
    world.router.bring_back("decode", 0)
    assert world.assign(prompt, "s").route == Route(0, 0)


def test_a_task_that_no_worker_serves_is_refused_also_when_workers_are_dead():
    world = World(2, prefill_tasks=[("plan",), ("plan",)])
    world.router.leave_out("prefill", 0)
    world.router.leave_out("prefill", 1)
    with pytest.raises(PshareError, match=r"prefill .*'sum'"):
        world.assign(prompt_of(2), task="sum")


def test_progress_counts_down_and_lost_work_counts_up_again():
    router = World(2).router
    ticket = router.take(Route(1, 0), 99)
    for tokens in (0, 64, 99, 32):
        router.prefilled(ticket, tokens)
        assert router.prefill_load == [0, max(99 - tokens, 0)]
    router.release(ticket)
    router.prefilled(ticket, 0)
    assert (router.prefill_load, router.decode_load) == ([0, 0], [0])
    with pytest.raises(AssertionError, match="released twice"):
        router.release(ticket)
    assert (router.prefill_load, router.decode_load) == ([0, 0], [0])


def test_a_begun_answer_is_no_work_for_prefill():
    fakes = make_engine({"t": [1]})
    fakes.engine.submit(Request("r", "t", tuple(range(40)), 2, response_start=9), lambda event: None)
    assert fakes.engine.router.prefill_load == [8]


def test_a_cache_cannot_have_more_than_the_prompt():
    router = World(2).router
    with pytest.raises(AssertionError, match="5 pages of a prompt of 4 are cached"):
        router.assign("plan", None, 64, page_keys("base", "", context_of(prompt_of(4)), PAGE), lambda worker: 5)


def test_what_is_remembered_is_bounded_and_the_longest_unused_goes_first(monkeypatch):
    monkeypatch.setattr(routing, "MAX_REMEMBERED", 3)
    world = World(2)
    for index, session in enumerate("abcadbae"):
        world.ask(prompt_of(3, 1000 * index), session)
        world.ask(prompt_of(4, 1000 * index), session)
    affinity = world.router._affinity
    assert list(affinity._sessions) == ["b", "a", "e"]
    assert len(affinity._behind) == 3


STEP = st.tuples(st.integers(0, 4), st.integers(0, 5), st.sampled_from([None, "a", "b"]), st.sampled_from(TASKS))


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(["prefix", "round_robin", "least_loaded"]),
    st.sampled_from([None, [TASKS, TASKS, TASKS], [("plan", "code"), TASKS, ("sum",)]]),
    st.lists(st.tuples(STEP, st.integers(0, 70)), max_size=40),
)
def test_the_books_are_right_after_anything_and_zero_at_the_end(policy, prefill_tasks, steps):
    world = World(3, policy, num_decode=2, prefill_tasks=prefill_tasks)
    router, live, dead = world.router, [], set()
    for (kind, choice, session, task), number in steps:
        if kind == 4:
            (router.bring_back if choice % 3 in dead else router.leave_out)("prefill", choice % 3)
            dead ^= {choice % 3}
        elif kind < 2 or not live:
            prompt = [choice % 2] * (number + 1)
            ticket = world.assign(prompt, session, task) if kind else router.take(Route(choice % 3, 0), len(prompt))
            live.append(ticket)
            able = {worker for worker in range(3) if prefill_tasks is None or task in prefill_tasks[worker]}
            assert ticket.route.prefill in (able - dead or able) or not kind
        elif kind == 2:
            router.prefilled(live[choice % len(live)], number)
        else:
            world.finish(live.pop(choice % len(live)))
        for worker in range(3):
            mine = [ticket for ticket in live if ticket.route.prefill == worker]
            assert router.prefill_load[worker] == sum(ticket.outstanding for ticket in mine)
            assert all(0 <= ticket.outstanding <= ticket.context_len for ticket in mine)
        assert router.decode_load == [sum(ticket.route.decode == worker for ticket in live) for worker in (0, 1)]
    for ticket in live:
        router.release(ticket)
    assert (router.prefill_load, router.decode_load) == ([0, 0, 0], [0, 0])
    assert not any(router._coming)
