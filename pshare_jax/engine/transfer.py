"""KV transfers from prefill pools to a decode pool: a gather, a device_put, and a scatter once the array is ready.

The prefill worker's thread calls `send` between its steps without waiting; the decode worker's thread calls `receive`,
which writes only content that has arrived, so that no decode step ever waits for a prefill. Pages that a prefill pool has
lost and the decode pool still has go the other way (`send_back`) before the base continues behind them.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from pshare_jax.engine.admission import Admission
from pshare_jax.engine.failures import MAX_FAILED_MOVES, StepFailed
from pshare_jax.engine.interfaces import EngineHooks
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.request import FAILED, Event
from pshare_jax.engine.sequence import PageTransfer, Sequence, State

logger = logging.getLogger(__name__)
MAX_IN_FLIGHT = 16
"""Transfers in flight to one decode pool: the content of each is held twice outside the pools."""


@dataclass
class TransferStats:
    """Written transfers: their number, pages, bytes and seconds from dispatch to write; and the number that failed."""

    count: int = 0
    num_pages: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    failures: int = 0


class KVTransfer:
    """The transfers to one decode worker."""

    def __init__(self, admission: Admission, worker: int, hooks: EngineHooks, page_bytes: int):
        self._admission, self._worker, self._hooks = admission, worker, hooks
        self._page_bytes = page_bytes
        self._pool: Pool = admission.decode_pools[worker]
        self.stats = TransferStats()

    @property
    def in_flight(self) -> int:
        """Number of transfers in flight."""
        return len(self._admission.in_flight[self._worker])

    def has_room(self, sequence: Sequence) -> bool:
        """Whether another transfer of the sequence may be sent.

        While the sequence waits for other sequences' pages, its transfers cannot be written. They take at most half of
        the room, since those sequences' prefill workers must be able to send the pages that it waits for.
        """
        held = sequence.decode.table
        waits = held is not None and held.manager.waiting(sequence)
        return self.in_flight < (MAX_IN_FLIGHT // 2 if waits else MAX_IN_FLIGHT)

    def send(self, transfer: PageTransfer) -> None:
        """Dispatches the transfer (called by the prefill pool's thread); if that fails, its sequence restarts."""
        try:
            transfer.content = self._pool.store.device_put(transfer.source.pool.store.gather(transfer.source_pages))
        except Exception:
            self.fail(transfer)

    def receive(self) -> bool:
        """Writes the transfers that have arrived (called by the decode pool's thread); whether any was written or dropped."""
        with self._hooks.lock:
            dropped = self._admission.drop_cancelled(self._worker)
        return write_arrived(self._arrived, self._write) or dropped

    def _arrived(self) -> list[PageTransfer]:
        with self._hooks.lock:
            writable = self._admission.writable(self._worker)
        return [transfer for transfer in writable if transfer.content is not None and transfer.content.is_ready()]

    def _write(self, transfer: PageTransfer) -> bool:
        """Writes it; False if it was not, and is not needed or has failed."""
        try:
            # The content is ready; this raises if the step that computed it has failed.
            transfer.content.block_until_ready()
        except Exception:
            self.fail(transfer)
            return False
        with self._hooks.lock:
            if transfer.cancelled or transfer.target.stale:
                return False
            pages = transfer.target_pages
        # If it is cancelled now, the next holder of its pages still writes later, since one thread writes the pool.
        try:
            self._pool.scatter(pages, transfer.content)
        except Exception as error:
            raise StepFailed("transfer", [(transfer.sequence, transfer.first)], error) from error
        with self._hooks.lock:
            self._count(transfer)
            if transfer.cancelled:
                self._admission.transfer_failed(transfer)
            else:
                self._admission.transfer_written(transfer)
            return not transfer.cancelled

    def send_back(self) -> bool:
        """Sends pages that prefill pools have lost back to them (called by the decode pool's thread); whether there were any."""
        with self._hooks.lock:
            transfers = self._admission.to_return(self._worker)
        for transfer in transfers:
            try:
                content = self._pool.store.gather(transfer.source_pages)
                transfer.content = transfer.target.pool.store.device_put(content)
            except Exception:
                self.fail(transfer)
        return bool(transfers)

    def fail(self, transfer: PageTransfer) -> None:
        """Content was lost on its way to either pool, perhaps with a failed step: the transfer's sequence restarts, and fails
        the second time."""
        sequence = transfer.sequence
        logger.exception("a KV transfer of request %s failed", sequence.request.id)
        with self._hooks.lock:
            self.stats.failures += 1
            needed = transfer.needed_by_sequence and not sequence.must_restart
            self._admission.transfer_failed(transfer)
            if not needed:
                return
            # A failed step fails the transfers of what it computed, and its own thread has perhaps not noticed it yet.
            sequence.failed_transfers.append(transfer.source)
            if sum(not source.stale for source in sequence.failed_transfers) < MAX_FAILED_MOVES:
                sequence.must_restart = True
            else:
                self._hooks.end(sequence, State.FAILED, Event(error=FAILED))

    def _count(self, transfer: PageTransfer) -> None:
        self.stats.count += 1
        self.stats.num_pages += transfer.last - transfer.first
        self.stats.num_bytes += (transfer.last - transfer.first) * self._page_bytes
        self.stats.seconds += time.monotonic() - transfer.started


def write_arrived(arrived: Callable[[], list[PageTransfer]], write: Callable[[PageTransfer], bool]) -> bool:
    """Writes the transfers that have arrived, each sequence's until one is not there or not written; whether there were any.

    `arrived` gives the first of each sequence: its next may be written when the one before is.
    """
    transfers = arrived()
    done = bool(transfers)
    while transfers:
        written = {transfer.sequence for transfer in transfers if write(transfer)}
        transfers = [transfer for transfer in arrived() if transfer.sequence in written]
    return done
