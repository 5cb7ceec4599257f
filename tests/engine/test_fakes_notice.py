"""The fakes must notice every kind of wrong page: it is a fault and changes the answer."""

import numpy as np
import pytest
from fake_engine import Client, make_engine
from serving_fakes import CHAIN, DECODE, NOBODY, PREFILL, TOKEN, WRITER, WRONG, Content, Echo

pytestmark = pytest.mark.host

PROMPT = list(range(20, 40))
OTHER = list(range(60, 80))


def stale(store, pages):
    """A page of another prompt, at the same position of its context."""
    store.pages[pages[1]] = store.pages[other_page(store, OTHER[4])]


def other_page(store, token):
    return next(page for page in range(1, store.num_pages) if store.pages[page, 0, TOKEN] == token)


def lost(store, pages):
    store.pages[pages[2]] = -1, NOBODY, -1


def swapped(store, pages):
    store.pages[pages[:2]] = store.pages[pages[1::-1]]


def doubled(store, pages):
    store.pages[pages[1]] = store.pages[pages[0]]


def one_slot(store, pages):
    store.pages[pages[0], 3, TOKEN] += 1


def prompt_by_decode(store, pages):
    store.pages[pages[0], :, WRITER] = DECODE


def other_beginning(store, pages):
    """The right tokens, computed after others than these."""
    store.pages[pages[1], :, CHAIN] += 1


def other_last_token(store, pages):
    """The slot read last."""
    store.pages[pages[5], 1, TOKEN] += 1


SABOTAGE = [stale, lost, swapped, doubled, one_slot, prompt_by_decode, other_beginning, other_last_token]


@pytest.mark.parametrize("spoil", SABOTAGE)
@pytest.mark.parametrize("colocated", [False, True])
def test_wrong_pages_are_noticed(spoil, colocated):
    echo = Echo("t")
    fakes = make_engine({"t": echo}, colocated=colocated)
    client = Client(fakes)
    client.ask("other", OTHER, max_tokens=30)
    client.ask("a", PROMPT, max_tokens=30)
    fakes.step_until(lambda: len(client.ids("a")) == 3)
    held = client.sequences["a"].decode.table
    assert held is not None
    spoil(fakes.decode_stores[0], held.pages)
    fakes.step_until(lambda: fakes.engine.idle)
    assert fakes.faults
    assert client.ids("a")[:3] == echo.answer(PROMPT, 3)
    assert WRONG in client.ids("a")[3:]
    assert client.ids("other") == echo.answer(OTHER, 30)


def test_a_last_prompt_token_of_prefills_is_noticed():
    echo = Echo("t")
    fakes = make_engine({"t": echo}, pipelined=False)
    client = Client(fakes)
    client.ask("a", PROMPT, max_tokens=30)
    fakes.step_until(lambda: len(client.ids("a")) == 3)
    held = client.sequences["a"].decode.table
    assert held is not None
    fakes.decode_stores[0].pages[held.pages[4], 3, WRITER] = PREFILL
    fakes.run()
    assert client.ids("a")[3] != echo.answer(PROMPT, 4)[3]


def test_a_wrong_page_table_is_noticed():
    fakes = make_engine({"t": Echo("t")})
    (store,), client = fakes.decode_stores, Client(fakes)
    put_table = store.put_table
    store.put_table = lambda tables, slot, pages: put_table(tables, slot, [pages[1], pages[0], *pages[2:]])
    client.ask("a", PROMPT, max_tokens=30)
    fakes.step_until(lambda: bool(client.ids("a")))
    assert fakes.faults
    assert client.ids("a")[0] == WRONG


def test_prefill_notices_too():
    fakes = make_engine({"t": Echo("t")}, chunk=8)
    client = Client(fakes)
    client.ask("a", PROMPT)
    fakes.step()
    held = client.sequences["a"].prefill.table
    assert held is not None
    fakes.prefill_stores[0].pages[held.pages[0]] = -1, NOBODY, -1
    fakes.step()
    assert fakes.faults


def test_a_copy_is_written_only_when_it_has_come():
    fakes = make_engine({"t": Echo("t")})
    store = fakes.decode_stores[0]
    fakes.hold(20)
    content = store.device_put(Content(np.full((1, 4, 3), 20)))
    store.scatter([1], content)
    assert "before they had come" in fakes.faults[0]
