"""What every sequence holds in every pool, from its arrival to its end: the queue, the page tables, and pages in flight.

The engine and its workers call every method under the engine's lock; admission.py decides who may leave the queue.
"""

import bisect
import functools
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from pshare_jax.engine.kv.pool import PageTable, Pool
from pshare_jax.engine.kv.waiting import Waiting, by_age, remove
from pshare_jax.engine.sequence import PageTransfer, Sequence, State
from pshare_jax.engine.shapes import pages_for


class Ledger:
    """By prefill worker, the waiting sequences and those being prefilled; by decode worker, the sequences that arrive or
    decode, and the transfers in flight. All lists of sequences are in order of age.

    A prefill and a decode worker with the same pool are colocated: their sequences have one page table, and no transfers.
    """

    def __init__(self, prefill_pools: Items[Pool], decode_pools: Items[Pool], max_rows: int, chunk_tokens: int):
        self.prefill_pools, self.decode_pools, self.max_rows = prefill_pools, decode_pools, max_rows
        self.pools = list({id(pool): pool for pool in (*prefill_pools, *decode_pools)}.values())
        self.waiting = [Waiting(pool, decode_pools, chunk_tokens) for pool in prefill_pools]
        self.prefilling: list[list[Sequence]] = [[] for _ in prefill_pools]
        self.arriving: list[list[Sequence]] = [[] for _ in decode_pools]
        self.decoding: list[list[Sequence]] = [[] for _ in decode_pools]
        self.in_flight: list[list[PageTransfer]] = [[] for _ in decode_pools]
        self.may_admit = [True for _ in prefill_pools]
        """By prefill worker, whether something has changed since its queue was last looked at."""
        self.refused: list[set[Sequence]] = [set() for _ in decode_pools]
        """By decode worker, sequences that are not admitted for lack of its pages, or gave them up: younger sequences
        reserve no pages there before them."""
        self._encoded = [0.0 for _ in prefill_pools]
        self._released = [0.0 for _ in decode_pools]
        """By worker, when it has last encoded a chunk, or released pages: the sequence may have left since."""
        self.num_restarts = 0
        self.num_adopted = 0
        self.num_returned = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a waiting or preempted sequence."""
        self.waiting[sequence.prefill_worker].add(sequence)
        self.may_admit[sequence.prefill_worker] = True

    def room_changed(self) -> None:
        """Pages or rows were released: sequences that did not fit may fit now."""
        self.may_admit = [True for _ in self.may_admit]

    # --- prefill and transfer -------------------------------------------------------------------------------------

    def ready_to_prefill(self, worker: int) -> list[Sequence]:
        """Sequences with tokens to prefill that wait for no other pages."""
        return [
            sequence
            for sequence in self.prefilling[worker]
            if not sequence.prefill.done and not sequence.prefill.returning and _can_start(sequence)
        ]

    def urgency(self, sequence: Sequence) -> int:
        """The number of the oldest sequence that waits for it: its own, or that of a sequence that needs its pages."""
        waiters = itertools.chain(*(held.manager.waiters_of(sequence) for held in sequence.tables))
        return min([sequence.number, *(waiter.number for waiter in waiters if isinstance(waiter, Sequence))])

    def prefilled(self, sequence: Sequence, held: PageTable, num_tokens: int) -> None:
        """The next `num_tokens` of its context are written (dispatched) into `held`: full pages are published."""
        prefill = sequence.prefill
        if prefill.table is not held:
            # It has given up its pages meanwhile.
            return
        self._advance(sequence, prefill.num_prefilled + num_tokens)

    def _advance(self, sequence: Sequence, num_prefilled: int) -> None:
        held, prefill = sequence.prefill.table, sequence.prefill
        assert held is not None
        first = prefill.num_prefilled // held.pool.page_size
        prefill.num_prefilled = num_prefilled
        sequence.progressed = self._encoded[sequence.prefill_worker] = time.monotonic()
        _publish(sequence, held, first, num_prefilled // held.pool.page_size)
        self.may_admit[sequence.prefill_worker] = True

    def return_pages(self, sequence: Sequence, last: int) -> None:
        """The leading pages up to `last` that only the decode pool has go back to the prefill pool."""
        source, target = sequence.decode.table, sequence.prefill.table
        assert source is not None
        assert target is not None
        sequence.prefill.returning = [
            PageTransfer(sequence, source, target, *part) for part in source.pool.moves(target.num_shared, last)
        ]

    def has_returning(self, worker: int) -> bool:
        """Whether pages of the decode worker's pool are to go back, or on their way. May be called without the lock."""
        sequences = itertools.chain(*self.prefilling)
        return any(sequence.decode_worker == worker and sequence.prefill.returning for sequence in sequences)

    def to_return(self, worker: int) -> list[PageTransfer]:
        """Pages of the decode worker's pool that are to go back and are not yet on their way."""
        return [
            transfer
            for sequence in itertools.chain(*self.prefilling)
            if sequence.decode_worker == worker and sequence.prefill.returning and _can_start(sequence)
            # Each is held twice outside the pools.
            for transfer in sequence.prefill.returning[:2]
            if transfer.content is None
        ]

    def returning(self, worker: int) -> list[PageTransfer]:
        """Pages on their way back to the prefill worker's pool that may be written once they have arrived."""
        firsts = [sequence.prefill.returning[0] for sequence in self.prefilling[worker] if sequence.prefill.returning]
        return [transfer for transfer in firsts if transfer.content is not None and _can_start(transfer.sequence)]

    def still_returning(self, transfer: PageTransfer) -> bool:
        """Whether its sequence still holds the pages, and needs them."""
        return not transfer.cancelled and not transfer.target.stale

    def return_written(self, transfer: PageTransfer) -> None:
        """The content is written into the prefill pool (dispatched), where its pages are published."""
        if self.still_returning(transfer):
            transfer.sequence.prefill.returning.remove(transfer)
            self.num_returned += transfer.last - transfer.first
            self._advance(transfer.sequence, transfer.last * transfer.target.pool.page_size)

    def next_transfer(self, sequence: Sequence) -> PageTransfer | None:
        """Pages that are prefilled and not yet sent, as many as go in one transfer; they stay held in both pools."""
        prefill, source, target = sequence.prefill, sequence.prefill.table, sequence.decode.table
        if source is None or target is None or source is target or not _can_start(sequence):
            return None
        size = source.pool.page_size
        available = pages_for(prefill.num_prefilled, size) if prefill.done else prefill.num_prefilled // size
        if prefill.num_sent >= available:
            return None
        transfer = PageTransfer(sequence, source, target, *source.pool.moves(prefill.num_sent, available)[0])
        source.manager.retain(transfer.source_pages, "transfer")
        self.in_flight[sequence.decode_worker].append(transfer)
        prefill.num_sent = transfer.last
        return transfer

    def leave_prefill(self, worker: int) -> list[Sequence]:
        """Sequences with their whole context prefilled and sent move on to their decode worker."""
        gone = [sequence for sequence in self.prefilling[worker] if _all_sent(sequence)]
        for sequence in gone:
            remove(self.prefilling[worker], sequence)
            sequence.move(State.TRANSFERRING)
            bisect.insort(self.arriving[sequence.decode_worker], sequence, key=by_age)
        return gone

    def transfers_of(self, sequence: Sequence) -> list[PageTransfer]:
        """The transfers in flight that the sequence still needs."""
        transfers = self.in_flight[sequence.decode_worker]
        return [transfer for transfer in transfers if transfer.sequence is sequence and transfer.needed_by_sequence]

    def writable(self, worker: int) -> list[PageTransfer]:
        """Transfers that may be written once their content has arrived: the first of each sequence that waits for no
        other sequence's pages.
        """
        first: dict[Sequence, PageTransfer] = {}
        for transfer in self.in_flight[worker]:
            first.setdefault(transfer.sequence, transfer)
        return [
            transfer
            for sequence, transfer in first.items()
            if transfer.adopted is not None or not transfer.target.manager.waiting(sequence)
        ]

    def transfer_written(self, transfer: PageTransfer) -> None:
        """The content is written into the decode pool (dispatched): full pages are published there."""
        if not self._finish(transfer):
            return
        sequence, manager, first = transfer.sequence, transfer.target.manager, transfer.first
        if transfer.adopted is None:
            sequence.progressed = time.monotonic()
            _publish(sequence, transfer.target, first, transfer.last)
            return
        last = min(transfer.last, len(sequence.keys))
        transfer.adopted[first:last] = manager.publish(transfer, sequence.keys, transfer.adopted, first, last)
        manager.release(transfer.adopted, "transfer")

    def transfer_failed(self, transfer: PageTransfer) -> None:
        """The content will not be written: sequences that wait for an adopted transfer restart (the caller ends its own
        sequence).
        """
        if self._finish(transfer) and transfer.adopted is not None:
            _restart(transfer.target.manager.drop(transfer))
            transfer.target.manager.release(transfer.adopted, "transfer")

    def drop_cancelled(self, worker: int) -> bool:
        """Drops the transfers that are cancelled or orphaned, or whose pool was rebuilt; whether there were any."""
        in_flight = self.in_flight[worker]
        gone = [transfer for transfer in in_flight if transfer.cancelled or transfer.target.stale or transfer.orphaned]
        for transfer in gone:
            self.transfer_failed(transfer)
        return bool(gone)

    def late(self, sequences: Iterable[Sequence], limit: float) -> list[Sequence]:
        """Those of the sequences that have made no progress since `limit`, if nor has any sequence that they wait for."""
        # All that wait for the same workers wait for the same: it is looked at once.
        beside = functools.cache(self._progress_beside)
        return [one for one in sequences if one.progressed < limit and self._last_progress(one, beside) < limit]

    def _last_progress(self, sequence: Sequence, beside: Callable[[int, int], float]) -> float:
        """When the sequence, or a sequence that it waits for, has last made progress."""
        seen, last = {sequence}, 0.0
        ahead = [sequence]
        for other in ahead:
            last = max(last, self._progress_around(other, beside))
            # Not those that came later: they may come forever.
            held = other.decode.table
            producers = [] if held is None else held.manager.producers_for(other)
            ahead += [one for one in producers if isinstance(one, Sequence) and one not in seen]
            seen.update(ahead)
        return last

    def _progress_beside(self, prefill_worker: int, decode_worker: int) -> float:
        """The last progress of all that keep a sequence in the queue of these workers waiting."""
        on_their_way = [*itertools.chain(*self.prefilling), *self.arriving[decode_worker]]
        to_same = [other for other in on_their_way if other.decode_worker == decode_worker]
        others = [*self.prefilling[prefill_worker], *to_same, *self.decoding[decode_worker]]
        return max([self._released[decode_worker], *(other.progressed for other in others)])

    def _progress_around(self, sequence: Sequence, beside: Callable[[int, int], float]) -> float:
        """The last progress of the sequence, and of those that share what it waits for: pages, a chunk, a row, a turn."""
        others: list[Sequence] = []
        prefilling, decode_worker = self.prefilling[sequence.prefill_worker], sequence.decode_worker
        held, last = sequence.decode.table, sequence.progressed
        if held is None:
            last = max(last, beside(sequence.prefill_worker, decode_worker))
        elif held.manager.waiting(sequence):
            pass
        elif sequence.state is State.PREFILLING:
            in_flight = [transfer.sequence for transfer in self.in_flight[decode_worker]]
            others = in_flight if sequence.prefill.done else prefilling
            last = max(last, self._encoded[sequence.prefill_worker])
        elif not self.transfers_of(sequence):
            others = self.decoding[decode_worker]
            last = max(last, self._released[decode_worker])
        return max([last, *(other.progressed for other in others)])

    def waits_for(self, sequence: Sequence, others: Items[Sequence]) -> bool:
        """Whether the sequence waits for pages that one of the others produces."""
        return any(producer in others for held in sequence.tables for producer in held.manager.producers_for(sequence))

    def cancel_adopted(self, limit: float) -> None:
        """Cancels adopted transfers that started before `limit`; the sequences that wait for them restart."""
        for transfer in itertools.chain(*self.in_flight):
            if transfer.adopted is not None and transfer.started < limit:
                transfer.cancelled = True

    def _finish(self, transfer: PageTransfer) -> bool:
        """Removes the transfer; False if it was no longer in flight, since its pool was rebuilt."""
        in_flight = self.in_flight[transfer.decode_worker]
        if transfer not in in_flight:
            return False
        in_flight.remove(transfer)
        transfer.source.manager.release(transfer.source_pages, "transfer")
        self.room_changed()
        return True

    # --- decode ---------------------------------------------------------------------------------------------------

    def arrived(self, worker: int) -> list[Sequence]:
        """Sequences with all their base KV in the decode pool that do not decode yet."""
        in_flight = {transfer.sequence for transfer in self.in_flight[worker] if transfer.needed_by_sequence}
        return [one for one in self.arriving[worker] if one not in in_flight and _has_arrived(one)]

    def start_decoding(self, worker: int) -> list[Sequence]:
        """Sequences with all their base KV in the decode pool release their prefill pages and start to decode, the oldest
        first, while their group has rows for them. Returns those that have got a row.
        """
        decoding, arriving = self.decoding[worker], self.arriving[worker]
        arrived = self.arrived(worker)
        for sequence in arrived:
            if sequence.prefill.table is not None:
                self._pin_while_running(sequence, sequence.prefill.table)
                self._release_prefill(sequence)
                self.room_changed()
        live = [sequence for sequence in decoding if not sequence.leaving and not sequence.decode.finishing]
        rows = Counter(sequence.group for sequence in live if sequence.decode.has_row)
        started, without = [], [sequence for sequence in (*live, *arrived) if not sequence.decode.has_row]
        for sequence in sorted(without, key=by_age):
            if rows[sequence.group] >= self.max_rows:
                continue
            rows[sequence.group] += 1
            sequence.decode.has_row = True
            started.append(sequence)
            if sequence.state is State.TRANSFERRING:
                remove(arriving, sequence)
                sequence.move(State.DECODING)
                bisect.insort(decoding, sequence, key=by_age)
                self.room_changed()
        return started

    def make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """A page for the last of so many tokens, if it needs one; False if the pool has none."""
        held = sequence.decode.table
        assert held is not None
        if held.fits(num_tokens):
            return True
        new = held.manager.allocate(1)
        if new is None:
            return False
        held.pages += new
        return True

    def victim(self, worker: int) -> Sequence | None:
        """The sequence that must give its pages in the decode pool to an older sequence: one that leaves anyway, else the
        youngest in any state; None if only one is left.
        """
        holders = self.holders(self.decode_pools[worker])
        leaving = [sequence for sequence in holders if sequence.leaving]
        if leaving:
            return leaving[0]
        return max(holders, key=by_age) if len(holders) > 1 else None

    def put_aside(self, sequence: Sequence) -> None:
        """Releases all pages of a sequence in any state, and requeues it unless it has ended.

        Another thread may be in the middle of a step on its pages: that thread alone writes to their pool, so whatever it
        still writes there precedes all that their next holders write.
        """
        places = {
            State.PREFILLING: self.prefilling[sequence.prefill_worker],
            State.TRANSFERRING: self.arriving[sequence.decode_worker],
            State.DECODING: self.decoding[sequence.decode_worker],
        }
        listed = next(sequences for sequences in places.values() if sequence in sequences)
        listed.remove(sequence)
        self._release(sequence)
        self.room_changed()
        if not sequence.final:
            self.refused[sequence.decode_worker].add(sequence)
            self._requeue(sequence)

    # --- out ------------------------------------------------------------------------------------------------------

    def take_out(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended, or moves to other workers, from the queue, if it is queued; sequences behind it
        may be admitted.
        """
        queue = self.waiting[sequence.prefill_worker]
        if sequence in queue:
            queue.remove(sequence)
            if sequence.final:
                self._take_hint(sequence)
        self.refused[sequence.decode_worker].discard(sequence)
        self.room_changed()

    def reap_prefill(self, worker: int) -> bool:
        """Releases all pages of the prefill worker's sequences that ended or must restart; whether there were any."""
        return self._reap(self.prefilling[worker])

    def reap_decode(self, worker: int) -> bool:
        """The same for the decode worker's sequences."""
        arriving = self._reap(self.arriving[worker])
        return self._reap(self.decoding[worker]) or arriving

    def _reap(self, sequences: list[Sequence]) -> bool:
        num_before = len(sequences)
        # A release can make others restart. They must go at once too: a sequence that was admitted in between would wait for
        # their pages, restart with them, and make them restart in turn, for ever.
        while gone := [sequence for sequence in sequences if sequence.leaving]:
            for sequence in gone:
                remove(sequences, sequence)
                self._release(sequence)
                self.room_changed()
                if not sequence.final:
                    self._requeue(sequence)
        return len(sequences) < num_before

    def _requeue(self, sequence: Sequence) -> None:
        if sequence.decode.saved is not None:
            sequence.move(State.PREEMPTED)
        else:
            self.num_restarts += 1
            sequence.lose_kv()
            sequence.move(State.WAITING)
        sequence.must_restart = sequence.decode.has_row = sequence.decode.finishing = False
        self.add(sequence)

    def holders(self, pool: Pool) -> list[Sequence]:
        """All sequences with pages in the pool."""
        return [sequence for _, sequence in self._admitted() if any(held.pool is pool for held in sequence.tables)]

    def check(self) -> None:
        """Raises AssertionError unless lists, states and every pool agree; when idle, also unless all pages are released."""
        live: set[object] = set(itertools.chain(*self.in_flight))
        for state, sequence in self._admitted():
            live.add(sequence)
            if sequence.state is not state and not sequence.final:
                raise AssertionError(f"a {sequence.state.value} sequence is listed as {state.value}")
        for pool in self.pools:
            pool.manager.check(live)
            if not live and pool.manager.num_used:
                raise AssertionError(f"{pool.name}: {pool.manager.num_used} pages are held by {pool.manager.holders}")

    def _admitted(self) -> list[tuple[State, Sequence]]:
        """Every sequence that may hold pages, and the state of its list."""
        lists = {State.PREFILLING: self.prefilling, State.TRANSFERRING: self.arriving, State.DECODING: self.decoding}
        return [(state, sequence) for state, groups in lists.items() for sequence in itertools.chain(*groups)]

    def _release(self, sequence: Sequence) -> None:
        """Releases all pages; sequences that waited for them to be produced restart."""
        self._released[sequence.decode_worker] = time.monotonic()
        held = sequence.decode.table
        if held is not None:
            self._leave_transfers(sequence, held)
            _restart(held.manager.drop(sequence))
        self._release_prefill(sequence)
        if held is not None:
            held.release()
        sequence.decode.table = None
        if sequence.final:
            self._take_hint(sequence)

    def _pin_while_running(self, sequence: Sequence, held: PageTable) -> None:
        """What it leaves in its prefill pool is pinned as from its end, whenever that is."""
        hint = sequence.request.hint
        if hint is not None and hint.pin_seconds and held is not sequence.decode.table:
            held.manager.sessions.pin(sequence.caller.session, math.inf)

    def _take_hint(self, sequence: Sequence) -> None:
        """Does what the hint of a sequence says, in every pool; it has ended, and holds no pages."""
        hint, caller = sequence.request.hint, sequence.caller
        if hint is None:
            return
        for manager in (pool.manager for pool in self.pools):
            manager.sessions.refresh(caller.parent)
            if hint.evict:
                manager.evict_session(caller.session)
            elif hint.pin_seconds is not None:
                manager.sessions.pin(caller.session, hint.pin_seconds)

    def _release_prefill(self, sequence: Sequence) -> None:
        for transfer in sequence.prefill.returning:
            transfer.cancelled = True
        sequence.prefill.returning = []
        held, sequence.prefill.table = sequence.prefill.table, None
        if held is not None and held is not sequence.decode.table:
            _restart(held.manager.drop(sequence))
            held.release()

    def _leave_transfers(self, sequence: Sequence, held: PageTable) -> None:
        """Transfers that other sequences wait for adopt the page table up to their last page; the rest is cancelled."""
        for transfer in self.transfers_of(sequence):
            pages = held.pages[: transfer.last]
            produced = pages[transfer.first :]
            awaited = held.manager.has_waiters(produced) and not held.manager.waiting(sequence)
            if held.stale or not awaited:
                transfer.cancelled = True
                continue
            held.manager.retain(pages, "transfer")
            held.manager.adopt(transfer, sequence, produced)
            transfer.adopted = pages
            self.num_adopted += 1


def _publish(sequence: Sequence, held: PageTable, first: int, last: int) -> None:
    last = min(last, len(sequence.keys))
    if first < last:
        held.pages[first:last] = held.manager.publish(sequence, sequence.keys, held.pages, first, last)


def _restart(waiters: Iterable[object]) -> None:
    for waiter in waiters:
        assert isinstance(waiter, Sequence), "a transfer waits for no pages"
        waiter.must_restart = True


def _has_arrived(sequence: Sequence) -> bool:
    held = sequence.decode.table
    assert held is not None
    return not sequence.leaving and not held.manager.waiting(sequence)


def _can_start(sequence: Sequence) -> bool:
    held = sequence.prefill.table
    return not sequence.leaving and held is not None and not held.manager.waiting(sequence)


def _all_sent(sequence: Sequence) -> bool:
    source, target = sequence.prefill.table, sequence.decode.table
    if sequence.leaving or not sequence.prefill.done:
        return False
    if source is None or source is target:
        return True
    return sequence.prefill.num_sent * source.pool.page_size >= sequence.prefill.context_len
