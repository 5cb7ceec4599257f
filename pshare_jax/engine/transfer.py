"""Moves pages from prefill pools to one decode pool: one gather, one device_put, one scatter when the array is there.

The thread that owns the prefill pool calls `send` between its steps and goes on; the thread that owns the decode pool
calls `receive`, which writes only what has arrived, so that no decode step ever waits for a prefill.
"""

import logging
import time
from dataclasses import dataclass

from pshare_jax.engine.admission import Admission
from pshare_jax.engine.interfaces import EngineHooks
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.page_transfer import PageTransfer
from pshare_jax.engine.request import FAILED, Event, Sequence, State

logger = logging.getLogger(__name__)
MAX_IN_FLIGHT = 16
"""Copies on their way to one decode pool: each holds its content twice outside the pools."""


@dataclass
class TransferStats:
    """Copies that arrived: how many, their pages and bytes, seconds from dispatch to written; and those that failed."""

    count: int = 0
    num_pages: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    failures: int = 0


class KVTransfer:
    """The way to one decode worker."""

    def __init__(self, admission: Admission, worker: int, hooks: EngineHooks, page_bytes: int):
        self._admission, self._worker, self._hooks = admission, worker, hooks
        self._page_bytes = page_bytes
        self._pool: Pool = admission.decode_pools[worker]
        self.stats = TransferStats()

    @property
    def in_flight(self) -> int:
        """Copies on their way."""
        return len(self._admission.copies[self._worker])

    def has_room(self, sequence: Sequence) -> bool:
        """Whether one more copy of the sequence may be sent.

        While it waits for pages of others its copies cannot be written: they leave half of the way to those others, who
        may have another prefill worker and else could not send what all wait for.
        """
        held = sequence.decode_pages
        waits = held is not None and held.cache.waiting(sequence)
        return self.in_flight < (MAX_IN_FLIGHT // 2 if waits else MAX_IN_FLIGHT)

    def send(self, copy: PageTransfer) -> None:
        """Dispatches the copy (called by the owner of the prefill side); if that fails, so does its request."""
        try:
            copy.content = self._pool.store.device_put(copy.source.pool.store.gather(copy.source_pages))
        except Exception:
            logger.exception("the KV transfer of request %s failed", copy.sequence.request.id)
            self._fail(copy)

    def receive(self) -> bool:
        """Writes the copies that have come into the pool (called by its owner); whether any is on its way no more."""
        with self._hooks.lock:
            dropped = self._admission.drop_unwanted(self._worker)
            due = [copy for copy in self._admission.due_copies(self._worker) if copy.content is not None]
        arrived = [copy for copy in due if copy.content.is_ready()]
        for copy in arrived:
            self._write(copy)
        return dropped or bool(arrived)

    def _write(self, copy: PageTransfer) -> None:
        try:
            # It is there; this raises if what should have computed it has failed.
            copy.content.block_until_ready()
        except Exception:
            logger.exception("the KV transfer of request %s failed", copy.sequence.request.id)
            self._fail(copy)
            return
        with self._hooks.lock:
            if copy.unwanted or copy.target.lost:
                return
            pages = copy.target_pages
        # Should the copy become unwanted just now, its pages' next holder writes after this: one thread writes the pool.
        self._pool.scatter(pages, copy.content)
        with self._hooks.lock:
            self._count(copy)
            if copy.unwanted:
                self._admission.copy_failed(copy)
            else:
                self._admission.arrived(copy)

    def _fail(self, copy: PageTransfer) -> None:
        with self._hooks.lock:
            self.stats.failures += 1
            self._admission.copy_failed(copy)
            if not copy.unwanted and copy.inherited is None:
                self._hooks.end(copy.sequence, State.FAILED, Event(error=FAILED))

    def _count(self, copy: PageTransfer) -> None:
        self.stats.count += 1
        self.stats.num_pages += copy.last - copy.first
        self.stats.num_bytes += (copy.last - copy.first) * self._page_bytes
        self.stats.seconds += time.monotonic() - copy.started
