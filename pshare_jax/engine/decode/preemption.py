"""Preempted sequences: the content of their private pages goes to host memory, and comes back before they decode again."""

import numpy as np

from pshare_jax.engine.failures import StepFailed
from pshare_jax.engine.kv.pool import PageTable
from pshare_jax.engine.sequence import Saved, Sequence
from pshare_jax.engine.shapes import pages_for


def save(sequence: Sequence) -> Saved:
    """Copies a preempted sequence's private pages to the host: the base can recompute only the prompt's full pages.

    No step of it may be in flight.

    Raises:
        StepFailed: the pages could not be read.
    """
    held, private = _private_pages(sequence)
    parts = held.pool.moves(0, len(private))
    try:
        return Saved([np.asarray(held.pool.store.gather(private[start:end])) for start, end in parts])
    except Exception as error:
        raise _failure(sequence, error) from error


def restore(sequence: Sequence) -> None:
    """Writes the saved content into the sequence's new pages.

    Raises:
        StepFailed: it could not be written.
    """
    held, private = _private_pages(sequence)
    assert sequence.decode.saved is not None
    parts = held.pool.moves(0, len(private))
    try:
        for (start, end), content in zip(parts, sequence.decode.saved.parts, strict=True):
            held.pool.scatter(private[start:end], held.pool.store.device_put(content))
    except Exception as error:
        raise _failure(sequence, error) from error
    sequence.decode.saved = None


def _failure(sequence: Sequence, error: Exception) -> StepFailed:
    return StepFailed("preemption", [(sequence, sequence.num_tokens)], error)


def _private_pages(sequence: Sequence) -> tuple[PageTable, list[int]]:
    """The page table, and the pages behind the prompt's full pages that hold KV."""
    held = sequence.decode.table
    assert held is not None
    return held, held.pages[len(sequence.keys) : pages_for(sequence.next_position, held.pool.page_size)]
