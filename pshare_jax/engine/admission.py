"""Admission of sequences, and the pages that each sequence holds in every pool from then until it ends.

The engine and its workers call every method under the engine's lock. A waiting sequence holds nothing. Admission reserves
prefill pages for its whole context, and decode pages for its tokens and the next token, all or nothing; so no two
sequences can wait for each other's pages.
"""

import bisect
import itertools
import operator
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items

from pshare_jax.engine.kv.pool import PageTable, Pool
from pshare_jax.engine.sequence import PageTransfer, PrefillProgress, Sequence, State
from pshare_jax.engine.shapes import pages_for

_age = operator.attrgetter("number")


class Admission:
    """By prefill worker, the waiting sequences and those being prefilled; by decode worker, the sequences that arrive or
    decode, and the transfers in flight.

    A prefill and a decode worker with the same pool are colocated: their sequences have one page table, and no transfers.
    """

    def __init__(self, prefill_pools: Items[Pool], decode_pools: Items[Pool]):
        self.prefill_pools, self.decode_pools = prefill_pools, decode_pools
        self.waiting: list[list[Sequence]] = [[] for _ in prefill_pools]
        self.prefilling: list[list[Sequence]] = [[] for _ in prefill_pools]
        self.arriving: list[list[Sequence]] = [[] for _ in decode_pools]
        self.decoding: list[list[Sequence]] = [[] for _ in decode_pools]
        self.in_flight: list[list[PageTransfer]] = [[] for _ in decode_pools]
        self._may_admit = [True for _ in prefill_pools]
        self._priority: dict[int, Sequence] = {}  # by decode worker
        self.num_restarts = 0
        self.num_adopted = 0

    # --- in -------------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queues a waiting or preempted sequence, the oldest first."""
        bisect.insort(self.waiting[sequence.prefill_worker], sequence, key=_age)
        self._may_admit[sequence.prefill_worker] = True

    def room_changed(self) -> None:
        """Pages were released: sequences that did not fit may fit now."""
        self._may_admit = [True for _ in self._may_admit]

    def admit(self, worker: int) -> list[Sequence]:
        """Admits waiting sequences, the oldest first, while the pools have room; returns those that it admitted.

        The first sequence that finds a decode pool full gets priority there: no younger sequence of any queue reserves in
        that pool before it.
        """
        if not self._may_admit[worker]:
            return []
        self._may_admit[worker] = False
        admitted = []
        for sequence in list(self.waiting[worker]):
            first = self._priority.get(sequence.decode_worker)
            if first is not None and first.number < sequence.number:
                continue
            if not self._reserve_decode(sequence):
                self._priority[sequence.decode_worker] = sequence
                continue
            self._end_priority(sequence)
            if not self._reserve_prefill(sequence):
                self._release(sequence)
                self._may_admit[worker] = False
                break
            self.waiting[worker].remove(sequence)
            sequence.move(State.PREFILLING)
            self.prefilling[worker].append(sequence)
            admitted.append(sequence)
        for sequence in admitted:
            self._left_queue(sequence)
        return admitted

    def _left_queue(self, gone: Sequence) -> None:
        """The sequences behind it for the same decode worker are nearer to their turn, which is progress."""
        for sequence in self.waiting[gone.prefill_worker]:
            if sequence.number > gone.number and sequence.decode_worker == gone.decode_worker:
                sequence.progressed = time.monotonic()

    def _end_priority(self, sequence: Sequence) -> None:
        if self._priority.get(sequence.decode_worker) is sequence:
            del self._priority[sequence.decode_worker]
            self.room_changed()

    def _reserve_decode(self, sequence: Sequence) -> bool:
        pool = self.decode_pools[sequence.decode_worker]
        held = sequence.decode.table = _reserve(sequence, pool, pages_for(sequence.num_tokens + 1, pool.page_size))
        if held is None:
            return False
        # The tail page of a preempted sequence is in host memory: the base computes only the full pages.
        full_len = len(sequence.keys) * pool.page_size
        context_len = sequence.request.base_len if sequence.decode.saved is None else full_len
        sequence.prefill = PrefillProgress(None, context_len, 0, num_sent=held.num_shared)
        sequence.must_restart = False
        return True

    def _reserve_prefill(self, sequence: Sequence) -> bool:
        held, prefill = sequence.decode.table, sequence.prefill
        assert held is not None
        pool = self.prefill_pools[sequence.prefill_worker]
        if held.num_shared * pool.page_size == prefill.context_len:
            # Every page is published or produced by others: nothing to prefill or send.
            prefill.num_prefilled = prefill.context_len
        else:
            num_pages = pages_for(prefill.context_len, pool.page_size)
            pages = held if pool is held.pool else _reserve(sequence, pool, num_pages)
            prefill.table = pages
            if pages is None:
                return False
            prefill.num_prefilled = pages.num_shared * pool.page_size
        if sequence.admitted is None:
            # Once per request, however often it is admitted.
            sequence.cached_tokens = prefill.num_prefilled
            pool.cache_stats.num_requests += 1
            pool.cache_stats.prompt_tokens += len(sequence.request.prompt)
            pool.cache_stats.cached_tokens += prefill.num_prefilled
        return True

    # --- prefill and transfer -------------------------------------------------------------------------------------

    def ready_to_prefill(self, worker: int) -> list[Sequence]:
        """Sequences with tokens to prefill that wait for no other sequence's pages; the oldest admission first."""
        return [sequence for sequence in self.prefilling[worker] if not sequence.prefill.done and _can_start(sequence)]

    def prefilled(self, sequence: Sequence, num_tokens: int) -> None:
        """The next `num_tokens` of its context are written (dispatched): full pages are published."""
        held, prefill = sequence.prefill.table, sequence.prefill
        assert held is not None
        first = prefill.num_prefilled // held.pool.page_size
        prefill.num_prefilled += num_tokens
        sequence.progressed = time.monotonic()
        _publish(sequence, held, first, prefill.num_prefilled // held.pool.page_size)

    def next_transfer(self, sequence: Sequence, most: int) -> PageTransfer | None:
        """At most `most` of the pages that are prefilled and not yet sent; they stay held in both pools."""
        prefill, source, target = sequence.prefill, sequence.prefill.table, sequence.decode.table
        if source is None or target is None or source is target or not _can_start(sequence):
            return None
        size = source.pool.page_size
        available = pages_for(prefill.num_prefilled, size) if prefill.done else prefill.num_prefilled // size
        first, last = prefill.num_sent, min(available, prefill.num_sent + most)
        if first >= last:
            return None
        transfer = PageTransfer(sequence, source, target, first, last)
        source.manager.retain(transfer.source_pages, "transfer")
        self.in_flight[sequence.decode_worker].append(transfer)
        prefill.num_sent = last
        return transfer

    def leave_prefill(self, worker: int) -> list[Sequence]:
        """Sequences with their whole context prefilled and sent move on to their decode worker."""
        gone = [sequence for sequence in self.prefilling[worker] if _all_sent(sequence)]
        for sequence in gone:
            self.prefilling[worker].remove(sequence)
            sequence.move(State.TRANSFERRING)
            self.arriving[sequence.decode_worker].append(sequence)
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

    def cancel_adopted(self, limit: float) -> None:
        """Cancels adopted transfers that started before `limit`; the sequences that wait for them restart."""
        for transfer in itertools.chain(*self.in_flight):
            if transfer.adopted is not None and transfer.started < limit:
                transfer.cancelled = True

    def _finish(self, transfer: PageTransfer) -> bool:
        """Removes the transfer; False if it was no longer in flight, since its pool was rebuilt."""
        in_flight = self.in_flight[transfer.sequence.decode_worker]
        if transfer not in in_flight:
            return False
        in_flight.remove(transfer)
        transfer.source.manager.release(transfer.source_pages, "transfer")
        self.room_changed()
        return True

    # --- decode ---------------------------------------------------------------------------------------------------

    def start_decoding(self, worker: int) -> list[Sequence]:
        """Sequences with all their base KV in the decode pool start to decode and release their prefill pages."""
        in_flight = {transfer.sequence for transfer in self.in_flight[worker] if transfer.needed_by_sequence}
        started = []
        for sequence in list(self.arriving[worker]):
            held = sequence.decode.table
            assert held is not None
            if sequence.final or sequence.must_restart or sequence in in_flight or held.manager.waiting(sequence):
                continue
            self.arriving[worker].remove(sequence)
            self._release_prefill(sequence)
            self.room_changed()
            sequence.move(State.DECODING)
            bisect.insort(self.decoding[worker], sequence, key=_age)
            started.append(sequence)
        return started

    def make_room(self, sequence: Sequence) -> bool:
        """A page for the sequence's next token, if it needs one; False if the pool has none."""
        held = sequence.decode.table
        assert held is not None
        if held.fits(sequence.num_tokens):
            return True
        new = held.manager.allocate(1)
        if new is None:
            return False
        held.pages += new
        return True

    def victim(self, worker: int) -> Sequence | None:
        """The sequence to preempt: the youngest that decodes, unless it is alone."""
        decoding = [sequence for sequence in self.decoding[worker] if not sequence.final]
        return decoding[-1] if len(decoding) > 1 else None

    def preempted(self, sequence: Sequence) -> None:
        """Requeues a sequence after its private pages were saved in host memory; it releases all pages."""
        self.decoding[sequence.decode_worker].remove(sequence)
        self._release(sequence)
        self.room_changed()
        sequence.move(State.PREEMPTED)
        self.add(sequence)

    # --- out ------------------------------------------------------------------------------------------------------

    def take_out(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended from the queue, if it is queued; sequences behind it may be admitted."""
        queue = self.waiting[sequence.prefill_worker]
        if sequence in queue:
            queue.remove(sequence)
            self._end_priority(sequence)
            self._may_admit[sequence.prefill_worker] = True
            self._left_queue(sequence)

    def reap_prefill(self, worker: int) -> bool:
        """Releases all pages of the prefill worker's sequences that ended or must restart; whether there were any."""
        return self._reap(self.prefilling[worker])

    def reap_decode(self, worker: int) -> bool:
        """The same for the decode worker's sequences."""
        arriving = self._reap(self.arriving[worker])
        return self._reap(self.decoding[worker]) or arriving

    def _reap(self, sequences: list[Sequence]) -> bool:
        gone = [sequence for sequence in sequences if sequence.final or sequence.must_restart]
        for sequence in gone:
            sequences.remove(sequence)
            self._release(sequence)
            self.room_changed()
            if not sequence.final:
                self.num_restarts += 1
                sequence.move(State.WAITING if sequence.decode.saved is None else State.PREEMPTED)
                self.add(sequence)
        return bool(gone)

    def holders(self, pool: Pool) -> list[Sequence]:
        """All sequences with pages in the pool."""
        tables = ((sequence, sequence.prefill.table, sequence.decode.table) for _, sequence in self._admitted())
        return [
            sequence for sequence, *held in tables if any(table is not None and table.pool is pool for table in held)
        ]

    def check(self) -> None:
        """Raises AssertionError unless lists, states and every pool agree; when idle, also unless all pages are released."""
        live: set[object] = set(itertools.chain(*self.in_flight))
        for state, sequence in self._admitted():
            live.add(sequence)
            if sequence.state is not state and not sequence.final:
                raise AssertionError(f"a {sequence.state.value} sequence is listed as {state.value}")
        for pool in {id(pool): pool for pool in (*self.prefill_pools, *self.decode_pools)}.values():
            pool.manager.check(live)
            if not live and pool.manager.num_used:
                raise AssertionError(f"{pool.name}: {pool.manager.num_used} pages are held by {pool.manager.holders}")

    def _admitted(self) -> list[tuple[State, Sequence]]:
        """Every sequence that may hold pages, and the state of its list."""
        lists = {State.PREFILLING: self.prefilling, State.TRANSFERRING: self.arriving, State.DECODING: self.decoding}
        return [(state, sequence) for state, groups in lists.items() for sequence in itertools.chain(*groups)]

    def _release(self, sequence: Sequence) -> None:
        """Releases all pages; sequences that waited for them to be produced restart."""
        held = sequence.decode.table
        if held is not None:
            self._leave_transfers(sequence, held)
            _restart(held.manager.drop(sequence))
        self._release_prefill(sequence)
        if held is not None:
            held.release()
        sequence.decode.table = None

    def _release_prefill(self, sequence: Sequence) -> None:
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


def _reserve(sequence: Sequence, pool: Pool, num_pages: int) -> PageTable | None:
    reservation = pool.manager.reserve(sequence, sequence.keys, num_pages)
    return None if reservation is None else PageTable(pool, pool.manager, *reservation)


def _publish(sequence: Sequence, held: PageTable, first: int, last: int) -> None:
    last = min(last, len(sequence.keys))
    if first < last:
        held.pages[first:last] = held.manager.publish(sequence, sequence.keys, held.pages, first, last)


def _restart(waiters: Iterable[object]) -> None:
    for waiter in waiters:
        assert isinstance(waiter, Sequence), "a transfer waits for no pages"
        waiter.must_restart = True


def _can_start(sequence: Sequence) -> bool:
    held = sequence.prefill.table
    return not sequence.final and not sequence.must_restart and held is not None and not held.manager.waiting(sequence)


def _all_sent(sequence: Sequence) -> bool:
    source, target = sequence.prefill.table, sequence.decode.table
    if sequence.final or sequence.must_restart or not sequence.prefill.done:
        return False
    if source is None or source is target:
        return True
    return sequence.prefill.num_sent * source.pool.page_size >= sequence.prefill.context_len
