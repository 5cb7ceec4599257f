"""PageManager under random sequences, transfers, aborts and pressure, against a slow model.

The same actions (pages_world.py) are chosen by hypothesis, which shrinks what fails, and by a long random walk, which
proves that it has been everywhere.
"""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pages_world import PagesWorld

from pshare_jax.engine.kv import keys as keys_module
from pshare_jax.engine.kv.sessions import Caller

pytestmark = pytest.mark.host
CHOICE = st.integers(0, 11)
PROMPT = st.lists(st.integers(0, 1), min_size=1, max_size=11)
SALT = st.sampled_from(["", "", "s"])
SESSIONS = [None, None, "a", "b", "c"]
SESSION, SECONDS = st.sampled_from("abc"), st.sampled_from([0, 1, 3])
CALLER = st.builds(Caller, st.sampled_from(SESSIONS), st.sampled_from(SESSIONS), st.booleans())


def weaken(monkeypatch):
    """Four-bit digests: hits are missed, never wrong, and the invariants hold."""
    strong = keys_module._digest
    monkeypatch.setattr(keys_module, "_digest", lambda data: bytes([strong(data)[0] & 15]))


class PagesMachine(RuleBasedStateMachine):
    """Every result is the model's."""

    @initialize(num_pages=st.integers(6, 16), loose_pins=st.booleans())
    def begin(self, num_pages, loose_pins):
        self.world = PagesWorld(num_pages, loose_pins=loose_pins)

    @rule(
        prompt=PROMPT,
        salt=SALT,
        tail=st.integers(1, 2),
        odd=st.integers(0, 7),
        times=st.integers(1, 3),
        caller=CALLER,
    )
    def ask(self, prompt, salt, tail, odd, times, caller):
        for _ in range(times):
            self.world.reserve(prompt, salt, tail, lookup=odd != 7, wait=odd != 6, caller=caller)

    @precondition(lambda self: self.world.live)
    @rule(choice=CHOICE, num=st.integers(1, 5))
    def publish(self, choice, num):
        self.world.publish(choice, num)

    @precondition(lambda self: self.world.live)
    @rule(choice=CHOICE)
    def finish(self, choice):
        self.world.finish(choice)

    @precondition(lambda self: self.world.live)
    @rule(choice=CHOICE)
    def abort(self, choice):
        self.world.abort(choice)

    @precondition(lambda self: self.world.live)
    @rule(choice=CHOICE, num=st.integers(1, 3))
    def leave_a_transfer(self, choice, num):
        self.world.leave_a_transfer(choice, num)

    @precondition(lambda self: self.world.live)
    @rule(choice=CHOICE, cut=st.integers(1, 6))
    def pin(self, choice, cut):
        self.world.pin(choice, cut)

    @precondition(lambda self: self.world.pins)
    @rule(choice=CHOICE)
    def unpin(self, choice):
        self.world.unpin(choice)

    @rule(name=SESSION, seconds=SECONDS)
    def pin_session(self, name, seconds):
        self.world.pin_session(name, seconds)

    @rule(name=SESSION)
    def refresh(self, name):
        self.world.refresh(name)

    @rule(name=SESSION)
    def end_session(self, name):
        self.world.end_session(name)

    @rule(seconds=SECONDS)
    def wait(self, seconds):
        self.world.wait(seconds)

    @rule(num=st.integers(0, 6))
    def allocate(self, num):
        self.world.allocate(num)

    @precondition(lambda self: self.world.private)
    @rule(choice=CHOICE)
    def free(self, choice):
        self.world.free(choice)

    @rule()
    def flush(self):
        self.world.flush()

    @invariant()
    def check(self):
        self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.end()


PagesMachine.TestCase.settings = settings(max_examples=70, stateful_step_count=40, deadline=None)
TestPages = PagesMachine.TestCase


def walk(world, draw, steps):
    """One random action after another, with the weights of a busy server."""

    def ask():
        salt, context = draw.choice(("", "", "", "s")), draw.choices((0, 1), (4, 1), k=draw.randint(1, 10))
        for _ in range(draw.choice((1, 2, 4))):
            own = draw.choices((0, 1), k=draw.randint(0, 5))
            lookup, wait = draw.random() < 0.85, draw.random() < 0.8
            caller = Caller(draw.choice(SESSIONS), draw.choice(SESSIONS), draw.random() < 0.2)
            world.reserve(context + own, salt, draw.randint(1, 2), lookup, wait, caller)

    def choice():
        return draw.randrange(12)

    actions = {
        ask: 7,
        (lambda: world.publish(choice(), draw.randint(1, 4))): 8,
        (lambda: world.finish(choice())): 8,
        (lambda: world.abort(choice())): 3,
        (lambda: world.leave_a_transfer(choice(), draw.randint(1, 3))): 2,
        (lambda: world.pin(choice(), draw.randint(1, 6))): 1,
        (lambda: world.unpin(choice())): 2,
        (lambda: world.pin_session(draw.choice("abc"), draw.choice((0, 1, 3, 9)))): 3,
        (lambda: world.refresh(draw.choice("abc"))): 1,
        (lambda: world.end_session(draw.choice("abc"))): 2,
        (lambda: world.wait(1)): 3,
        (lambda: world.allocate(draw.randint(0, 4))): 2,
        (lambda: world.free(choice())): 4,
        world.flush: 0.1,
    }
    for action in draw.choices(list(actions), list(actions.values()), k=steps):
        action()
        world.check()
    world.end()


@pytest.mark.parametrize("kind", ["strict", "loose", "weak"])
def test_a_long_walk_goes_everywhere(kind, monkeypatch):
    if kind == "weak":
        weaken(monkeypatch)
    draw = random.Random(kind)
    seen = {}
    for num_pages in (12, 30, 50):
        world = PagesWorld(num_pages, exact=kind != "weak", loose_pins=kind != "strict")
        walk(world, draw, 600)
        seen = {name: seen.get(name, 0) + count for name, count in world.seen.items()}
    assert all(seen.values()), f"the walk has not been everywhere: {seen}"
