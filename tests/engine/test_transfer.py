"""transfer.py: which pages are transferred, in which parts, which are held meanwhile, and which are never written."""

import pytest
from fake_engine import PAGE, Client, make_engine
from serving_fakes import Echo

from pshare_jax.engine.request import FAILED
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State
from pshare_jax.engine.shapes import bucket_of, page_buckets, transfer_ranges

pytestmark = pytest.mark.host

ECHO = Echo("t")


def noted_moves(fakes):
    """Number of pages of each transfer into the decode pool."""
    store, moves = fakes.decode_stores[0], []
    scatter = store.scatter

    def note(ids, content):
        moves.append(len(ids))
        scatter(ids, content)

    store.scatter = note
    return moves


def copies(fakes):
    return fakes.engine.admission.in_flight[0]


def test_a_context_moves_in_parts_of_the_largest_bucket():
    fakes = make_engine({"t": ECHO}, chunk=64, moves=(2, 5))
    moves = noted_moves(fakes)
    client = Client(fakes)
    client.ask("a", range(51), max_tokens=3)
    fakes.run()
    assert moves == [5, 5, 3]
    stats = fakes.engine.transfers[0].stats
    assert (stats.count, stats.num_pages, stats.num_bytes) == (3, 13, 130)
    assert stats.seconds > 0
    assert client.ids("a") == ECHO.answer(range(51), 3)


def test_only_what_the_decode_worker_lacks_is_moved():
    fakes = make_engine({"t": ECHO}, chunk=64, moves=(32,))
    moves = noted_moves(fakes)
    client = Client(fakes)
    # A tail page is private, so the third request transfers its own although the first request's was the same.
    prompts = [range(22), [*range(22), *range(50, 61)], range(22), range(21)]
    for prompt in prompts:
        name = client.ask(prompt=prompt, max_tokens=3)
        fakes.run()
        assert client.ids(name) == ECHO.answer(prompt, 3)
    assert moves == [6, 3, 1]
    assert fakes.engine.transfers[0].stats.count == 3


def test_pages_move_while_the_rest_is_prefilled():
    fakes = make_engine({"t": ECHO}, chunk=6, moves=(32,))
    moves = noted_moves(fakes)
    client = Client(fakes)
    client.ask("a", range(22), max_tokens=3)
    fakes.run()
    # After 6, 12, 18 and 21 tokens; a page is sent when it is full, the tail at the end.
    assert moves == [1, 2, 1, 2]


def test_both_sides_are_pinned_until_the_copy_is_done():
    fakes = make_engine({"t": ECHO}, chunk=64, moves=(32,))
    gate = fakes.hold(1)
    client = Client(fakes)
    client.ask("a", [1] * 22)
    fakes.step(3)
    assert client.state("a") is State.TRANSFERRING
    (copy,) = copies(fakes)
    source, target = (worker.pool.manager for worker in (*fakes.engine.prefill_workers, *fakes.engine.decode_workers))
    assert source.holders["transfer"] == 6
    fakes.engine.abort("a")
    fakes.engine.prefill_workers[0].pool.manager.flush()
    assert all(source.references(page) for page in copy.source_pages)
    assert all(target.references(page) for page in copy.target.pages)
    fakes.step(2)
    assert source.holders["transfer"] == 0
    gate.open = True
    fakes.run()


def test_a_pinned_page_is_not_lent_to_others():
    """The prefill pool is under pressure while pages of it are in flight."""
    fakes = make_engine({"t": ECHO}, pages=14, decode_pages=60)
    gate = fakes.hold(1)
    client = Client(fakes)
    client.ask("slow", [1] * 22, max_tokens=4)
    fakes.step(3)
    for number in range(2, 8):
        client.ask(prompt=[number] * 22, max_tokens=4)
    fakes.step(40)
    assert not client.events["slow"]
    gate.open = True
    fakes.run()
    for name, sequence in client.sequences.items():
        assert client.ids(name) == ECHO.answer(sequence.request.prompt, 4)


def test_what_comes_after_its_pool_has_failed_is_not_written(caplog):
    fakes = make_engine({"t": ECHO}, chunk=64, moves=(32,))
    gate = fakes.hold(1)
    client = Client(fakes)
    client.ask("runs", [2] * 9, max_tokens=20)
    client.ask("is copied", [1] * 22, max_tokens=4)
    fakes.step_until(lambda: client.state("is copied") is State.TRANSFERRING)
    (late,) = copies(fakes)
    # One more token is in flight.
    fakes.decode["t"].fail_at = len(client.ids("runs")) + 1
    moves = noted_moves(fakes)
    fakes.step()
    assert fakes.engine.decode_workers[0].pool.generation == 1
    fakes.decode["t"].fail_at = None
    fakes.decode_stores[0].gates.clear()
    gate.open = True
    fakes.run()
    assert late.target.stale
    # Each was sent once more, and nothing else: first the pages that the prefill pool still had, then the tail.
    assert sorted(moves) == [1, 2, 5]
    for name, count in (("runs", 20), ("is copied", 4)):
        assert client.ids(name) == ECHO.answer(client.sequences[name].request.prompt, count)


def test_a_copy_whose_source_pool_has_failed_is_whole_or_not_used(caplog):
    """It was gathered before the failure, so the requests that wait for it may use it."""
    fakes = make_engine({"t": ECHO}, num_prefill=2, chunk=64, moves=(32,))
    gate = fakes.hold(1)
    client = Client(fakes)
    for name, prefill in (("owner", 0), ("waits", 1)):
        client.ask(name, [1] * 22, max_tokens=4, route=Route(prefill, 0))
        fakes.step(3)
    fakes.prefill[0].fail_on = 9
    client.ask("fails", [9] * 22, route=Route(0, 0))
    fakes.step(2)
    assert fakes.engine.admission.num_adopted == 1
    fakes.decode_stores[0].gates.clear()
    gate.open = True
    fakes.run()
    assert (client.end("fails"), client.events["fails"][-1].retry) == (FAILED, False)
    for name in ("owner", "waits"):
        assert client.ids(name) == ECHO.answer([1] * 22, 4)


def test_colocated_workers_move_nothing():
    fakes = make_engine({"t": ECHO}, colocated=True)
    client = Client(fakes)
    client.ask("a", range(3 * PAGE + 2), max_tokens=3)
    fakes.run()
    assert client.ids("a") == ECHO.answer(range(3 * PAGE + 2), 3)
    assert fakes.engine.transfers[0].stats.count == 0


@pytest.mark.parametrize(("buckets", "largest_waste"), [((2, 8), 5), ((2, 8, 32), 5), ((2, 5), 2), ((32,), 31)])
def test_ranges_of_a_transfer_cover_all_pages_with_little_padding(buckets, largest_waste):
    """Padding is worth less than another transfer, and nowhere are there two padded transfers of one run of pages."""
    for last in range(1, 100):
        ranges = list(transfer_ranges(7, 7 + last, buckets))
        assert [page for start, end in ranges for page in range(start, end)] == list(range(7, 7 + last))
        padding = [bucket_of(end - start, buckets) - (end - start) for start, end in ranges]
        assert not any(padding[:-1])
        assert padding[-1] <= largest_waste
    assert [end - start for start, end in transfer_ranges(0, 9, (2, 8))] == [8, 1]
    assert [end - start for start, end in transfer_ranges(0, 26, (2, 8, 32))] == [8, 8, 8, 2]
    assert [end - start for start, end in transfer_ranges(0, 27, (2, 8, 32))] == [27]


def test_sizes_of_transfers():
    assert [page_buckets(most, "cpu") for most in (1, 4, 8, 32)] == [[1], [2, 4], [2, 8], [2, 8]]
    assert [page_buckets(most, "gpu") for most in (16, 128)] == [[2, 8, 16], [2, 8, 32]]
