"""Copies a preempted sequence's private pages to host memory and back; called by the pool's thread.

The base can recompute only the prompt's full pages; the tail page and the decode module's own KV exist nowhere else.
"""

import numpy as np

from pshare_jax.engine.kv.pool import PageTable
from pshare_jax.engine.sequence import Saved, Sequence
from pshare_jax.engine.shapes import pages_for


def save(sequence: Sequence) -> Saved:
    """Copies the sequence's private pages to the host."""
    held, private = _private_pages(sequence)
    most = held.pool.move_pages
    starts = range(0, len(private), most)
    return Saved([np.asarray(held.pool.store.gather(private[start : start + most])) for start in starts])


def restore(sequence: Sequence) -> None:
    """Writes the saved content into the sequence's new pages."""
    held, private = _private_pages(sequence)
    assert sequence.decode.saved is not None
    most = held.pool.move_pages
    for index, content in enumerate(sequence.decode.saved.parts):
        held.pool.scatter(private[index * most : (index + 1) * most], held.pool.store.device_put(content))
    sequence.decode.saved = None


def _private_pages(sequence: Sequence) -> tuple[PageTable, list[int]]:
    """The page table, and the pages behind the prompt's full pages that hold KV."""
    held = sequence.decode.table
    assert held is not None
    return held, held.pages[len(sequence.keys) : pages_for(sequence.next_position, held.pool.page_size)]
