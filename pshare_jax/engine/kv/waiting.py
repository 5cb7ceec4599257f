"""The queue of one prefill worker: its waiting sequences in lanes, so that admission looks at the oldest of each lane alone.

The ledger adds and removes sequences, admission.py reads the lanes; every method is called under the engine's lock.
"""

import bisect
import operator
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Literal, NamedTuple

from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.shapes import pages_for

by_age = operator.attrgetter("number")
Kind = Literal["short", "long", "prefetch"]


class Lane(NamedTuple):
    """What sequences have in common whose turn is near, or not, for the same reasons."""

    decode_worker: int
    group: int
    kind: Kind


class Waiting:
    """Waiting and preempted sequences, by lane and age.

    A prompt is short if what would have to be encoded, if it were admitted now, fits in a chunk: an estimate from the one
    page behind which a chunk is left. When that page enters or leaves a pool, the sequence changes its lane.
    """

    def __init__(self, pool: Pool, decode_pools: Items[Pool], chunk_tokens: int):
        self._pool, self._decode_pools, self._chunk_tokens = pool, decode_pools, chunk_tokens
        self._lanes: dict[Lane, list[Sequence]] = {}
        self._lane_of: dict[Sequence, Lane] = {}
        self._moved: set[Sequence] = set()

    def __len__(self) -> int:
        return len(self._lane_of)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._lane_of

    def __iter__(self) -> Iterator[Sequence]:
        """All sequences, the oldest first."""
        return iter(sorted(self._lane_of, key=by_age))

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        digest = self._decisive(sequence)
        if digest is not None:
            for pool in self._pools(sequence):
                pool.watch.add(digest, sequence, self._moved)
        self._enter(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a queued sequence out."""
        digest = self._decisive(sequence)
        if digest is not None:
            for pool in self._pools(sequence):
                pool.watch.remove(digest, sequence)
        self._moved.discard(sequence)
        self._leave(sequence)

    def firsts(self, after: int) -> Iterator[tuple[Lane, Sequence]]:
        """Of each lane the oldest sequence with a number beyond `after`."""
        while self._moved:
            sequence = self._moved.pop()
            self._leave(sequence)
            self._enter(sequence)
        for lane, sequences in self._lanes.items():
            index = bisect.bisect_right(sequences, after, key=by_age)
            if index < len(sequences):
                yield lane, sequences[index]

    def _enter(self, sequence: Sequence) -> None:
        lane = self._lane_of[sequence] = Lane(sequence.decode_worker, sequence.group, self._kind(sequence))
        bisect.insort(self._lanes.setdefault(lane, []), sequence, key=by_age)

    def _leave(self, sequence: Sequence) -> None:
        lane = self._lane_of.pop(sequence)
        remove(self._lanes[lane], sequence)
        if not self._lanes[lane]:
            del self._lanes[lane]

    def _kind(self, sequence: Sequence) -> Kind:
        if sequence.request.prefetches:
            return "prefetch"
        digest = self._decisive(sequence)
        if digest is not None:
            return "short" if any(pool.manager.has_digest(digest) for pool in self._pools(sequence)) else "long"
        return "long" if self._num_ahead(sequence) else "short"

    def _decisive(self, sequence: Sequence) -> bytes | None:
        """The digest of the page whose presence makes the prompt short; None if no page does."""
        num_ahead = self._num_ahead(sequence)
        return sequence.keys[num_ahead - 1].digest if 0 < num_ahead <= len(sequence.keys) else None

    def _num_ahead(self, sequence: Sequence) -> int:
        """Pages of the context before its last chunk."""
        page_size = self._pool.page_size
        return pages_for(max(encoded_len(sequence, page_size) - self._chunk_tokens, 0), page_size)

    def _pools(self, sequence: Sequence) -> set[Pool]:
        return {self._pool, self._decode_pools[sequence.decode_worker]}


def encoded_len(sequence: Sequence, page_size: int) -> int:
    """Leading tokens of which a sequence needs the base's KV when it is admitted.

    The tail page of a preempted sequence is in host memory, and that of a prefetch is of no use to others: the base computes
    only their full pages.
    """
    whole = sequence.decode.saved is None and not sequence.request.prefetches
    return sequence.split.base_len if whole else len(sequence.keys) * page_size


def remove(sequences: list[Sequence], sequence: Sequence) -> None:
    """Takes a sequence out of a list in order of age that has it."""
    index = bisect.bisect_left(sequences, sequence.number, key=by_age)
    assert sequences[index] is sequence, "the list is not in order of age"
    del sequences[index]
