"""The books of all pools together: who is admitted, what it holds, what it waits for, and what goes back when it ends.

The engine and its workers call every method under the engine's lock. A waiting sequence holds nothing; admission
reserves prefill pages for its whole context and decode pages for all its tokens and one more, all or nothing, so that no
two sequences can ever wait for each other's pages. Host code, imports no jax.
"""

import bisect
import time
from collections.abc import Sequence as Items

from pshare_jax.engine.kv.pool import PageTable, Pool
from pshare_jax.engine.page_transfer import PageTransfer
from pshare_jax.engine.request import Sequence, State
from pshare_jax.engine.shapes import pages_for


class Admission:
    """Waiting sequences of every prefill worker, admitted ones, and those that a decode worker will get or has.

    A prefill and a decode worker with the same pool are colocated: their sequences hold one page table, nothing moves.
    """

    def __init__(self, prefill_pools: Items[Pool], decode_pools: Items[Pool]):
        self.prefill_pools, self.decode_pools = prefill_pools, decode_pools
        self.waiting: list[list[Sequence]] = [[] for _ in prefill_pools]
        self.prefilling: list[list[Sequence]] = [[] for _ in prefill_pools]
        self.arriving: list[list[Sequence]] = [[] for _ in decode_pools]
        self.decoding: list[list[Sequence]] = [[] for _ in decode_pools]
        self.copies: list[list[PageTransfer]] = [[] for _ in decode_pools]
        self._may_admit = [True for _ in prefill_pools]
        self._next: dict[int, Sequence] = {}
        self.num_restarts = 0
        self.num_inherited_copies = 0

    # --- in -------------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queues a waiting or preempted sequence, the oldest first."""
        bisect.insort(self.waiting[sequence.prefill_worker], sequence, key=lambda one: one.number)
        self._may_admit[sequence.prefill_worker] = True

    def room_changed(self) -> None:
        """Pages came back somewhere: what could not be admitted may be now."""
        self._may_admit = [True for _ in self._may_admit]

    def admit(self, worker: int) -> bool:
        """Reserves for as many waiting sequences as the pools have room for, in the order of their coming; whether for any.

        Who finds a decode pool full is its next: nobody younger is let into that pool before, from any queue.
        """
        if not self._may_admit[worker]:
            return False
        self._may_admit[worker] = False
        admitted = []
        for sequence in list(self.waiting[worker]):
            target = sequence.decode_worker
            first = self._next.get(target)
            if first is not None and first.number < sequence.number:
                continue
            if not self._reserve_decode(sequence):
                self._next[target] = sequence
                continue
            self._not_next(sequence)
            if not self._reserve_prefill(sequence):
                may_admit = [other != worker and flag for other, flag in enumerate(self._may_admit)]
                self._release(sequence)
                self._may_admit = may_admit
                break
            self.waiting[worker].remove(sequence)
            sequence.move(State.PREFILLING)
            self.prefilling[worker].append(sequence)
            admitted.append(sequence)
        for sequence in admitted:
            self._left_queue(sequence)
        return bool(admitted)

    def _left_queue(self, gone: Sequence) -> None:
        """Who stood behind it for the same decode worker has come nearer to its turn, which is progress."""
        for sequence in self.waiting[gone.prefill_worker]:
            if sequence.number > gone.number and sequence.decode_worker == gone.decode_worker:
                sequence.progressed = time.monotonic()

    def _not_next(self, sequence: Sequence) -> None:
        if self._next.get(sequence.decode_worker) is sequence:
            del self._next[sequence.decode_worker]
            self.room_changed()

    def _reserve_decode(self, sequence: Sequence) -> bool:
        pool = self.decode_pools[sequence.decode_worker]
        num_pages = pages_for(sequence.num_tokens + 1, pool.page_size)
        held = self._reserve(sequence, pool, num_pages)
        sequence.decode_pages = held
        if held is None:
            return False
        # A preempted sequence has its tail page's content in host memory: the base makes full pages alone for it.
        full_len = len(sequence.keys) * pool.page_size
        sequence.context_len = sequence.request.base_len if sequence.saved is None else full_len
        sequence.num_sent = held.num_shared
        sequence.lost, sequence.copies_in_flight = False, 0
        return True

    def _reserve_prefill(self, sequence: Sequence) -> bool:
        held = sequence.decode_pages
        assert held is not None
        pool = self.prefill_pools[sequence.prefill_worker]
        if held.num_shared * pool.page_size == sequence.context_len:
            # All there, or on its way by others: nothing to prefill or send.
            sequence.num_prefilled = sequence.context_len
        elif pool is held.pool:
            sequence.prefill_pages = held
            sequence.num_prefilled = held.num_shared * pool.page_size
        else:
            sequence.prefill_pages = self._reserve(sequence, pool, pages_for(sequence.context_len, pool.page_size))
            if sequence.prefill_pages is None:
                return False
            sequence.num_prefilled = sequence.prefill_pages.num_shared * pool.page_size
        self._count_hits(sequence, pool)
        return True

    def _count_hits(self, sequence: Sequence, pool: Pool) -> None:
        """A request's hits count once, however often it is admitted."""
        if not sequence.counted:
            sequence.counted = True
            sequence.cached_tokens = sequence.num_prefilled
            pool.cache_stats.count(len(sequence.request.prompt), sequence.num_prefilled)

    def _reserve(self, sequence: Sequence, pool: Pool, num_pages: int) -> PageTable | None:
        reservation = pool.cache.reserve(sequence, sequence.keys, num_pages)
        if reservation is None:
            return None
        pool.cache.pend(sequence, sequence.keys, reservation.pages, reservation.num_shared)
        return PageTable(pool, pool.cache, reservation.pages, reservation.num_shared)

    # --- prefill and transfer -------------------------------------------------------------------------------------

    def ready_to_prefill(self, worker: int) -> list[Sequence]:
        """Sequences of the worker with tokens to prefill, whose beginning is all there; the oldest admission first."""
        return [one for one in self.prefilling[worker] if one.num_prefilled < one.context_len and self._can_start(one)]

    def _can_start(self, sequence: Sequence) -> bool:
        held = sequence.prefill_pages
        return not sequence.final and not sequence.lost and held is not None and not held.cache.waiting(sequence)

    def prefilled(self, sequence: Sequence, num_tokens: int) -> None:
        """So many more of its context's tokens are written (dispatched): full pages are published."""
        held = sequence.prefill_pages
        assert held is not None
        first = sequence.num_prefilled // held.pool.page_size
        sequence.num_prefilled += num_tokens
        sequence.progressed = time.monotonic()
        self._publish(sequence, held, first, sequence.num_prefilled // held.pool.page_size)

    def next_copy(self, sequence: Sequence, most: int) -> PageTransfer | None:
        """The next pages, at most so many, that its decode pool lacks and that its prefill pool has; both sides pinned."""
        source, target = sequence.prefill_pages, sequence.decode_pages
        if source is None or target is None or source is target or not self._can_start(sequence):
            return None
        size = source.pool.page_size
        done = sequence.num_prefilled == sequence.context_len
        available = pages_for(sequence.num_prefilled, size) if done else sequence.num_prefilled // size
        first, last = sequence.num_sent, min(available, sequence.num_sent + most)
        if first >= last:
            return None
        copy = PageTransfer(sequence, source, target, first, last)
        source.cache.allocator.retain(copy.source_pages, "transfer")
        self.copies[sequence.decode_worker].append(copy)
        sequence.num_sent = last
        sequence.copies_in_flight += 1
        return copy

    def leave_prefill(self, worker: int) -> list[Sequence]:
        """Sequences whose context is all prefilled and sent go on to their decode worker."""
        gone = [one for one in self.prefilling[worker] if not one.final and not one.lost and self._all_sent(one)]
        for sequence in gone:
            self.prefilling[worker].remove(sequence)
            sequence.move(State.TRANSFERRING)
            self.arriving[sequence.decode_worker].append(sequence)
        return gone

    def _all_sent(self, sequence: Sequence) -> bool:
        source, target = sequence.prefill_pages, sequence.decode_pages
        if sequence.num_prefilled < sequence.context_len:
            return False
        if source is None or source is target:
            return True
        return sequence.num_sent * source.pool.page_size >= sequence.context_len

    def arrived(self, copy: PageTransfer) -> None:
        """The copy is written into the decode pool (dispatched): its full pages are published there."""
        if copy not in self.copies[copy.sequence.decode_worker]:
            return
        self._finish(copy)
        last = min(copy.last, len(copy.sequence.keys))
        if copy.inherited is None:
            copy.sequence.copies_in_flight -= 1
            copy.sequence.progressed = time.monotonic()
            self._publish(copy.sequence, copy.target, copy.first, last)
            return
        pages = copy.target.cache.publish(copy, copy.sequence.keys, copy.inherited, copy.first, last)
        copy.inherited[copy.first : last] = pages
        copy.target.cache.allocator.release(copy.inherited, "transfer")

    def copy_failed(self, copy: PageTransfer) -> None:
        """The copy will not be written: who waits for it is told (its own sequence is the caller's to end)."""
        if copy not in self.copies[copy.sequence.decode_worker]:
            # Told before: its pool was rebuilt while it was being sent.
            return
        self._finish(copy)
        if copy.inherited is not None:
            self._lose(copy.target.cache.drop(copy))
            copy.target.cache.allocator.release(copy.inherited, "transfer")

    def due_copies(self, worker: int) -> list[PageTransfer]:
        """Copies that may be written as soon as they have come: of each sequence the first, if it waits for no other's."""
        first: dict[Sequence, PageTransfer] = {}
        for copy in self.copies[worker]:
            first.setdefault(copy.sequence, copy)
        return [
            one for one in first.values() if one.inherited is not None or not one.target.cache.waiting(one.sequence)
        ]

    def drop_unwanted(self, worker: int) -> bool:
        """Copies that nobody needs any more, or whose pool was rebuilt, are forgotten; whether there were any."""
        gone = [one for one in self.copies[worker] if one.unwanted or one.target.lost or self._deserted(one)]
        for copy in gone:
            self.copy_failed(copy)
        return bool(gone)

    def give_up_copies(self, limit: float) -> None:
        """Copies begun before `limit` that outlived their sequence and never came: who waits for one makes its own."""
        for copy in (one for group in self.copies for one in group):
            if copy.inherited is not None and copy.started < limit:
                copy.unwanted = True

    def _deserted(self, copy: PageTransfer) -> bool:
        """Whether those for whom the copy outlived its sequence have gone too."""
        return copy.inherited is not None and not copy.target.cache.has_waiters(copy.target_pages)

    def _finish(self, copy: PageTransfer) -> None:
        self.copies[copy.sequence.decode_worker].remove(copy)
        copy.source.cache.allocator.release(copy.source_pages, "transfer")
        self.room_changed()

    # --- decode ---------------------------------------------------------------------------------------------------

    def start_decoding(self, worker: int) -> list[Sequence]:
        """Sequences whose base KV is all in the decode pool now; they hold prefill pages no more."""
        started = []
        for sequence in list(self.arriving[worker]):
            held = sequence.decode_pages
            assert held is not None
            if sequence.final or sequence.lost or sequence.copies_in_flight or held.cache.waiting(sequence):
                continue
            self.arriving[worker].remove(sequence)
            self._release_prefill(sequence)
            sequence.move(State.DECODING)
            bisect.insort(self.decoding[worker], sequence, key=lambda one: one.number)
            started.append(sequence)
        return started

    def make_room(self, sequence: Sequence) -> bool:
        """A page for the sequence's next token, if it needs one; False if the pool has none."""
        held = sequence.decode_pages
        assert held is not None
        if held.fits(sequence.num_tokens):
            return True
        new = held.cache.allocator.allocate(1)
        if new is None:
            return False
        held.pages += new
        return True

    def victim(self, worker: int) -> Sequence | None:
        """Whom to preempt: the youngest that decodes, but never the only one."""
        decoding = [one for one in self.decoding[worker] if not one.final]
        return decoding[-1] if len(decoding) > 1 else None

    def preempted(self, sequence: Sequence) -> None:
        """Its private pages are saved in host memory: it gives everything back and waits for its admission."""
        self.decoding[sequence.decode_worker].remove(sequence)
        self._release(sequence)
        sequence.move(State.PREEMPTED)
        self.add(sequence)

    # --- out ------------------------------------------------------------------------------------------------------

    def take_out(self, sequence: Sequence) -> None:
        """A sequence that has ended leaves the queue, if it is in one; who stood behind it may be admitted."""
        queue = self.waiting[sequence.prefill_worker]
        if sequence in queue:
            queue.remove(sequence)
            self._not_next(sequence)
            self._may_admit[sequence.prefill_worker] = True
            self._left_queue(sequence)

    def reap_prefill(self, worker: int) -> bool:
        """Ended sequences of the prefill worker give everything back, those that lost pages wait again; whether any did."""
        return self._reap(self.prefilling[worker])

    def reap_decode(self, worker: int) -> bool:
        """The same for the decode worker's sequences."""
        arriving = self._reap(self.arriving[worker])
        return self._reap(self.decoding[worker]) or arriving

    def _reap(self, sequences: list[Sequence]) -> bool:
        gone = [one for one in sequences if one.final or one.lost]
        for sequence in gone:
            sequences.remove(sequence)
            self._release(sequence)
            if not sequence.final:
                self.num_restarts += 1
                sequence.move(State.WAITING if sequence.saved is None else State.PREEMPTED)
                self.add(sequence)
        return bool(gone)

    def holders(self, pool: Pool) -> list[Sequence]:
        """All sequences with pages in the pool."""
        groups = [*self.prefilling, *self.arriving, *self.decoding]
        return [
            one
            for group in groups
            for one in group
            if any(held is not None and held.pool is pool for held in (one.prefill_pages, one.decode_pages))
        ]

    def check(self) -> None:
        """Proves the books of every pool; at an idle moment also that nothing is held."""
        live = {one for group in (*self.prefilling, *self.arriving, *self.decoding) for one in group}
        copies = {copy for group in self.copies for copy in group}
        for pool in {id(pool): pool for pool in (*self.prefill_pools, *self.decode_pools)}.values():
            pool.cache.check(live | copies)
            if not live and not copies and pool.allocator.num_used:
                raise AssertionError(f"{pool.name}: {pool.allocator.num_used} pages are held by nobody that lives")

    def _publish(self, sequence: Sequence, held: PageTable, first: int, last: int) -> None:
        last = min(last, len(sequence.keys))
        if first < last:
            held.pages[first:last] = held.cache.publish(sequence, sequence.keys, held.pages, first, last)

    def _release(self, sequence: Sequence) -> None:
        """Gives back all pages; who waited for what will not come now has lost it."""
        held = sequence.decode_pages
        if held is not None:
            self._leave_copies(sequence, held)
            self._lose(held.cache.drop(sequence))
        self._release_prefill(sequence)
        if held is not None:
            held.release()
        sequence.decode_pages = None

    def _release_prefill(self, sequence: Sequence) -> None:
        held, sequence.prefill_pages = sequence.prefill_pages, None
        self.room_changed()
        if held is None or held is sequence.decode_pages:
            return
        self._lose(held.cache.drop(sequence))
        held.release()

    def _leave_copies(self, sequence: Sequence, held: PageTable) -> None:
        """Copies in flight that others wait for go on for them, with the pages up to theirs; the rest is given up."""
        for copy in self.copies[sequence.decode_worker]:
            if copy.sequence is not sequence or copy.target is not held:
                continue
            pages = held.pages[: copy.last]
            wanted = held.cache.has_waiters(pages[copy.first :]) and not held.cache.waiting(sequence)
            if held.lost or not wanted:
                copy.unwanted = True
                continue
            held.cache.allocator.retain(pages, "transfer")
            held.cache.hand_over(sequence, copy, pages[copy.first :])
            copy.inherited = pages
            self.num_inherited_copies += 1

    def _lose(self, waiters: list) -> None:
        for waiter in waiters:
            if isinstance(waiter, PageTransfer):
                raise AssertionError("a copy waits for nobody")
            waiter.lost = True
