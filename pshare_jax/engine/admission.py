"""Admission: which waiting sequence may hold pages, the oldest first; every method is called under the engine's lock.

A waiting sequence holds nothing. Admission reserves prefill pages for its whole context, and decode pages for its tokens
and the next token, all or nothing; so no two sequences can wait for each other's pages. A sequence is admitted only when
its turn is near: there are pages, its decode module has rows, and few chunks are to be prefilled before its own. Younger
sequences pass it only while it waits for something that they do not need.
"""

import bisect
from collections import Counter
from collections.abc import Sequence as Items

from pshare_jax.engine.kv.ledger import Ledger
from pshare_jax.engine.kv.pool import PageTable, Pool
from pshare_jax.engine.kv.waiting import Kind, Lane, by_age, encoded_len
from pshare_jax.engine.sequence import PrefillProgress, Sequence, State
from pshare_jax.engine.shapes import pages_for

CHUNKS_AHEAD = 2
"""A prompt is admitted while fewer chunks of its kind (long or short, schedule.py) wait on its prefill worker; prefetches are
one more kind, since other prompts pass them.
"""

RESERVE_PAGES = 1
"""Pages that admission leaves for the next tokens of each running sequence, so that none must give up its pages at once."""


class Admission(Ledger):
    """The ledger of all sequences, and the rule by which they leave its queues.

    `max_rows` and `chunk_tokens` are the most rows of a decode step and the most tokens of a prefill step.
    """

    def __init__(self, prefill_pools: Items[Pool], decode_pools: Items[Pool], max_rows: int, chunk_tokens: int):
        super().__init__(prefill_pools, decode_pools, max_rows, chunk_tokens)
        self._chunk_tokens = chunk_tokens

    def admit(self, worker: int) -> list[Sequence]:
        """Admits waiting sequences of a prefill worker, the oldest first; returns those that it admitted.

        A sequence that the decode pool has no room for is `refused`, and no younger sequence reserves pages there before it;
        once there is room it waits for nothing else, since others wait for it.
        """
        if not self.may_admit[worker]:
            return []
        self.may_admit[worker] = False
        rows, left, admitted, last = self._rows(), self._tokens_left(worker), [], -1
        while (sequence := self._next(worker, last, rows, left)) is not None:
            last, refused = sequence.number, self.refused[sequence.decode_worker]
            waits = self._waits(sequence)
            if not self._has_decode_pages(sequence, waits):
                refused.add(sequence)
                continue
            if not self._has_prefill_pages(sequence, waits):
                break
            self._reserve(sequence, waits)
            if sequence in refused:
                refused.remove(sequence)
                # The next sequence for that decode pool may be in another worker's queue.
                self.room_changed()
            self.waiting[worker].remove(sequence)
            sequence.move(State.PREFILLING)
            bisect.insort(self.prefilling[worker], sequence, key=by_age)
            rows[_rows_of(sequence)] += sequence.prefill.done and not sequence.request.prefetches
            left[self._kind(sequence, sequence.prefill.num_left)] += sequence.prefill.num_left
            admitted.append(sequence)
        return admitted

    def _next(self, worker: int, after: int, rows: Counter[tuple[int, int]], left: dict[Kind, int]) -> Sequence | None:
        """The oldest sequence, of those with numbers beyond `after`, that is refused, or whose turn is near, and that no
        older sequence keeps waiting. It visits the oldest of each lane, not all that wait.
        """
        queue = self.waiting[worker]
        refused = [min(sequences, key=by_age, default=None) for sequences in self.refused]
        able = [one for one in refused if one is not None and one.number > after and one in queue]
        for lane, first in queue.firsts(after):
            older = refused[lane.decode_worker]
            if self._is_near(lane, rows, left) and (older is None or first.number < older.number):
                able.append(first)
        return min(able, key=by_age, default=None)

    def _is_near(self, lane: Lane, rows: Counter[tuple[int, int]], left: dict[Kind, int]) -> bool:
        """Whether the lane's group has rows, and few chunks of its kind are to be prefilled before it."""
        most = CHUNKS_AHEAD * self._chunk_tokens
        if min(left["short"], left["long"]) >= most or left[lane.kind] >= most:
            return False
        return lane.kind == "prefetch" or rows[lane.decode_worker, lane.group] < 2 * self.max_rows

    def _rows(self) -> Counter[tuple[int, int]]:
        """Sequences that decode, or could if there were a row, by decode worker and group."""
        return Counter(
            _rows_of(sequence)
            for _, sequence in self._admitted()
            if sequence.prefill.done and not sequence.leaving and not sequence.request.prefetches
        )

    def _tokens_left(self, worker: int) -> dict[Kind, int]:
        """Tokens that the prefill worker has yet to encode, by kind of prompt."""
        left: dict[Kind, int] = {"short": 0, "long": 0, "prefetch": 0}
        for sequence in self.prefilling[worker]:
            left[self._kind(sequence, sequence.prefill.num_left)] += sequence.prefill.num_left
        return left

    def _kind(self, sequence: Sequence, num_left: int) -> Kind:
        if sequence.request.prefetches:
            return "prefetch"
        return "short" if num_left <= self._chunk_tokens else "long"

    def _waits(self, sequence: Sequence) -> bool:
        """Whether it waits for pages that other sequences bring to the decode pool: not for those of another prefill worker
        if its own has them.
        """
        own, target = self.prefill_pools[sequence.prefill_worker].manager, self._decode_pool(sequence).manager
        if own is target:
            return True
        producers = target.producers_of(sequence.keys)
        elsewhere = any(
            isinstance(other, Sequence) and other.prefill_worker != sequence.prefill_worker for other in producers
        )
        return not elsewhere or own.num_hits(sequence.keys) < target.num_shareable(sequence.keys)

    def _decode_pool(self, sequence: Sequence) -> Pool:
        return self.decode_pools[sequence.decode_worker]

    def _num_decode_pages(self, sequence: Sequence) -> int:
        if sequence.request.prefetches:
            return len(sequence.keys)
        return pages_for(sequence.num_tokens + 1, self._decode_pool(sequence).page_size)

    def _has_decode_pages(self, sequence: Sequence, waits: bool) -> bool:
        pool = self._decode_pool(sequence)
        spare = RESERVE_PAGES * len(self.holders(pool))
        return pool.manager.could_reserve(sequence.keys, self._num_decode_pages(sequence), spare, waits)

    def _has_prefill_pages(self, sequence: Sequence, waits: bool) -> bool:
        pool, target = self.prefill_pools[sequence.prefill_worker], self._decode_pool(sequence)
        context_len, manager = encoded_len(sequence, pool.page_size), target.manager
        shared = manager.num_shareable(sequence.keys) if waits else manager.num_hits(sequence.keys)
        if pool is target or shared * pool.page_size == context_len:
            return True
        return pool.manager.could_reserve(sequence.keys, pages_for(context_len, pool.page_size))

    def _reserve(self, sequence: Sequence, waits: bool) -> None:
        pool, target = self.prefill_pools[sequence.prefill_worker], self._decode_pool(sequence)
        context_len, num_hits = encoded_len(sequence, pool.page_size), target.manager.num_hits(sequence.keys)
        held = sequence.decode.table = _reserved(sequence, target, self._num_decode_pages(sequence), waits)
        prefill = sequence.prefill = PrefillProgress(None, context_len, 0, num_sent=held.num_shared)
        if held.num_shared * pool.page_size == context_len:
            # Every page is published or produced by others: nothing to prefill or send.
            prefill.num_prefilled = context_len
        elif pool is target:
            prefill.table, prefill.num_prefilled = held, held.num_shared * pool.page_size
        else:
            prefill.table = _reserved(sequence, pool, pages_for(context_len, pool.page_size), True)
            prefill.num_prefilled = prefill.table.num_shared * pool.page_size
            self.return_pages(sequence, num_hits)
        if sequence.admitted is None:
            # Once per request, however often it is admitted.
            sequence.cached_tokens = context_len - prefill.num_left
            pool.cache_stats.num_requests += 1
            pool.cache_stats.prompt_tokens += len(sequence.request.prompt)
            pool.cache_stats.cached_tokens += sequence.cached_tokens


def _rows_of(sequence: Sequence) -> tuple[int, int]:
    return sequence.decode_worker, sequence.group


def _reserved(sequence: Sequence, pool: Pool, num_pages: int, waits: bool) -> PageTable:
    reservation = pool.manager.reserve(sequence, sequence.keys, num_pages, waits, sequence.caller)
    assert reservation is not None, "the pool had room a moment ago"
    return PageTable(pool, pool.manager, *reservation)
