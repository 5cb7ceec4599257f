"""A preempted sequence's private pages to host memory and back. Host-side, imports no jax.

Only the prompt's full pages can be made again by the base; what a decode module wrote, and the tail page that it wrote
into, exist once. Called by the decode worker, which owns the pool.
"""

import numpy as np

from pshare_jax.serving.request import Saved, Sequence


def save(sequence: Sequence) -> Saved:
    """Copies the pages behind the prompt's full ones, as far as they hold KV (all but the last token's) to the host."""
    held = sequence.decode_pages
    assert held is not None
    first, size = len(sequence.keys), held.pool.page_size
    private = held.pages[first : -(-(sequence.num_tokens - 1) // size)]
    most, store = held.pool.move_pages, held.pool.store
    parts = [np.asarray(store.take(private[start : start + most])) for start in range(0, len(private), most)]
    return Saved(first, parts)


def restore(sequence: Sequence) -> None:
    """Writes the saved pages into the sequence's new ones."""
    held, saved = sequence.decode_pages, sequence.saved
    assert held is not None
    assert saved is not None
    most = held.pool.move_pages
    private = held.pages[saved.first : -(-(sequence.num_tokens - 1) // held.pool.page_size)]
    for index, content in enumerate(saved.parts):
        held.pool.put(private[index * most : (index + 1) * most], held.pool.store.place(content))
    sequence.saved = None
