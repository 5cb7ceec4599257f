"""The host's work for a turn: the bytecodes that the engine runs depend on rows, not on context length or waiting requests."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_engine import Client, make_engine
from serving_fakes import EOS, VOCAB

import pshare_jax
from pshare_jax.engine.request import Hint
from pshare_jax.engine.sequence import State
from pshare_jax.model.paged_batch import DecodeBatch

pytestmark = pytest.mark.host
ROWS, CHUNK = 4, 64
PACKAGE = str(Path(pshare_jax.__file__).parent)


def bytecodes(work):
    """How many bytecodes of the package run in `work()`, in this thread; type checks of the tests do not count."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


class World:
    """Requests on an engine whose device steps do nothing, so that only the host's work is left: all rows decode, as many
    sequences wait for a row, and the others for admission.
    """

    def __init__(self, context, waiting, colocated=True):
        self.context, self.num = context, 0
        pages = (2 * ROWS + 2) * (context // 4 + 60)
        self.fakes = make_engine(
            {"t": [65]},
            pages=pages,
            rows=ROWS,
            chunk=CHUNK,
            colocated=colocated,
            max_requests=1000,
            max_len=2000,
            debug=False,
        )
        self.engine, self.client = self.fakes.engine, Client(self.fakes)
        for store in (*self.fakes.prefill_stores, *self.fakes.decode_stores):
            store.run = self._run
        admission = self.engine.admission
        for _ in range(2 * ROWS):
            self.ask()
        while len(admission.arriving[0]) + len(admission.decoding[0]) < 2 * ROWS:
            self.turn()
        for _ in range(waiting):
            self.ask()
        for _ in range(60):
            self.turn()
        assert len(self.in_state(State.DECODING)) == len(self.in_state(State.TRANSFERRING)) == ROWS

    def _run(self, step, params, tokens, rows):
        if isinstance(tokens, DecodeBatch):
            return np.eye(1, VOCAB, 65, dtype=np.float32).repeat(len(tokens.slots), 0), rows
        return SimpleNamespace(is_ready=lambda: True, block_until_ready=lambda: None)

    def ask(self, **fields):
        self.num += 1
        prompt = [self.num % 250, self.num // 250, *[1] * (self.context - 2)]
        return self.client.ask(prompt=prompt, max_tokens=400, stop_ids=frozenset({EOS}), **fields)

    def turn(self):
        self.engine._step_workers()

    def in_state(self, state):
        return [sequence for sequence in self.engine.live if sequence.state is state]

    def replace(self):
        """A request that decodes is aborted, and another is admitted, prefilled and decoded."""
        self.engine.abort(self.in_state(State.DECODING)[0].request.id)
        for _ in range(30):
            self.turn()
        assert len(self.in_state(State.DECODING)) == ROWS


def decode_turns(world):
    """Turns that only decode; each page size of them allocates one page a row."""
    num_tokens = sum(len(sequence.decode.completion_ids) for sequence in world.engine.live)
    count = bytecodes(lambda: [world.turn() for _ in range(8)])
    assert sum(len(sequence.decode.completion_ids) for sequence in world.engine.live) == num_tokens + 8 * ROWS
    return count


@pytest.mark.parametrize("colocated", [True, False])
def test_a_decode_turn_costs_the_same_whatever_the_context_and_however_many_wait(colocated):
    least = decode_turns(World(16, 4, colocated))
    for context, waiting in [(16, 400), (1024, 4)]:
        world = World(context, waiting, colocated)
        assert len(world.in_state(State.WAITING)) == waiting
        assert decode_turns(world) <= 1.02 * least, (context, waiting)


@pytest.mark.parametrize("context", [40, 200])
def test_the_next_requests_are_admitted_without_a_look_at_all_that_wait(context):
    """Short prompts, and those of which only part would be prefilled if others had been."""
    counts, admitted = [], []
    for waiting in (8, 400):
        world = World(context, waiting)
        counts.append(bytecodes(world.replace))
        admitted.append(waiting - len(world.in_state(State.WAITING)))
    assert counts[1] <= 1.05 * counts[0]
    assert admitted[0] == admitted[1] > 0


def test_a_request_arrives_and_leaves_without_a_look_at_all_that_wait():
    counts = []
    for waiting in (8, 400):
        world = World(200, waiting)
        counts.append(bytecodes(lambda world=world: world.engine.abort(world.ask(session="s", hint=Hint(evict=True)))))
    assert counts[1] <= 1.02 * counts[0]


def test_what_old_requests_wait_for_is_looked_at_once(monkeypatch):
    world = World(16, 40)
    for sequence in world.engine.live:
        sequence.progressed -= 1000.0
    world.turn()
    looked, look = [], world.engine.admission._progress_beside
    monkeypatch.setattr(world.engine.admission, "_progress_beside", lambda *pair: looked.append(pair) or look(*pair))
    world.engine.expire()
    assert looked == [(0, 0)]
    assert len(world.in_state(State.WAITING)) == 40
