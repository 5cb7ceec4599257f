"""Worker processes: an ordered map over them, and how a worker ends with its parent.

The preparation of training data maps records to samples; its loader has grain start its workers.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from pshare_jax.errors import PshareError

T = TypeVar("T")
R = TypeVar("R")
_CHUNK = 64


def ordered_map(function: Callable[[T], R], items: Iterable[T], num_workers: int) -> Generator[R, None, None]:
    """`map`, by `num_workers` processes to which `function` is pickled once (0: in this process).

    Results come in order, and an exception at the place of its item, with any number. Closing the iterator ends the
    processes.

    Raises:
        PshareError: a process cannot be started, or died.
    """
    if not num_workers:
        yield from map(function, items)
        return
    chunks = _chunks(items)
    with ExitStack() as stack:
        # A worker has one chunk at a time: with two, it and this process could wait for each other to read.
        busy = deque(stack.enter_context(_Worker(function, chunk)) for chunk in islice(chunks, num_workers))
        while busy:
            worker = busy.popleft()
            results = worker.results()
            following = next(chunks, None)
            if following is not None:
                worker.send(following)
                busy.append(worker)
            for result in results:
                if isinstance(result, Exception):
                    raise result
                yield result


def exit_with_parent() -> None:
    """In a worker process: exits after the parent process, and ignores Ctrl-C, which a terminal sends to both."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Worker:
    """A process that maps chunks, and the connection to it."""

    def __init__(self, function: Callable[[Any], Any], chunk: list[Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        try:
            self._process.start()
        except OSError as error:
            raise PshareError(
                f"Cannot start a worker process: {error.strerror or error}; lower data.num_workers."
            ) from None
        finally:
            theirs.close()
        self.send(chunk)

    def send(self, chunk: list[Any]) -> None:
        try:
            self._connection.send(chunk)
        except BrokenPipeError:
            raise self._died() from None

    def results(self) -> list[Any]:
        """The results of the chunk, the last maybe an exception."""
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None

    def _died(self) -> PshareError:
        self._process.join()
        return PshareError(
            f"A worker process of the preparation died with exit code {self._process.exitcode}; lower data.num_workers if "
            "the memory is short."
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()
        self._process.close()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    exit_with_parent()
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        connection.send(_mapped(function, chunk))


def _mapped(function: Callable[[Any], Any], chunk: list[Any]) -> list[Any]:
    results: list[Any] = []
    for item in chunk:
        try:
            results.append(function(item))
        except Exception as error:
            # Raised in the parent, at this item's place.
            return [*results, error]
    return results


def _chunks(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
