"""Failed device steps: which request is guilty, and what may not be tried again.

A failed step takes the whole pool's content with it (its arrays were donated), but no request need fail for that: all are
queued again. The sequences of the step become suspects, and each runs such steps alone until it is beyond the place of the
failure. Only a suspect that fails again and again, alone, while steps on padding succeed, is guilty: it fails, and the same
request is refused for a while. A shape that ran out of memory, or that failed twice without a guilty request, is not used
again.
"""

import hashlib
import logging
import struct
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Items

from pshare_jax.engine.request import Request
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.shapes import CompiledShapes, Shape
from pshare_jax.errors import PshareError

logger = logging.getLogger(__name__)
MOVES = ("transfer", "return")
"""Kinds of steps that write the pages of one sequence into a pool."""
MAX_FAILED_MOVES = 2
"""Failed transfers that end a request."""
MAX_ACCUSED = 2
"""Failures of a suspect, each alone and followed by a good step on padding, that make it guilty: after one the device may
have come back in between."""
BAN_SECONDS = 600.0
MAX_BANNED = 1024
MAX_FAILURES = 5
"""A worker that fails so many steps without a good step between must prove that it works."""
NOT_DISPATCHED = sys.maxsize
"""The `order` of a step that could not be dispatched: all dispatched steps came before it."""
Places = Items[tuple[Sequence, int]]
"""The sequences of a step, and how far each is in steps of its kind: tokens encoded, scored, or prompt and answer."""


class StepFailed(Exception):
    """A device step has failed, at these places before it; its cause is `__cause__`.

    `order` is the step's number among those of its pool (kv/pool.py).
    """

    def __init__(
        self, kind: str, places: Places, error: Exception, shape: Shape | None = None, order: int = NOT_DISPATCHED
    ):
        super().__init__(f"a {kind} step failed")
        self.kind, self.places, self.shape, self.order = kind, list(places), shape, order
        self.__cause__ = error

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences of the step."""
        return [sequence for sequence, _ in self.places]


class RowFailed(Exception):
    """Host code has failed for one sequence of a step; the cause is its `__cause__`."""

    def __init__(self, sequence: Sequence):
        super().__init__(sequence.request.id)
        self.sequence = sequence


class WorkerBroken(PshareError):
    """A worker cannot even run a step on padding: its thread ends, to be restarted."""


class RequestBanned(PshareError):
    """The same request has made a device step fail before."""


class StepWatch:
    """What became of one worker's steps: suspects, guilt, and shapes that are not used again. Used under the engine's lock."""

    def __init__(self, compiled: CompiledShapes):
        self._compiled = compiled
        # Shapes that are not used while these suspects of their failed steps are tried.
        self._blamed: dict[Shape, set[Sequence]] = {}
        self._acquitted: set[Shape] = set()
        self._num_failed = 0

    def failed(self, failure: StepFailed) -> list[Sequence]:
        """Returns the guilty sequences of a failed step; the others are suspects now, and so is the step's shape."""
        self._num_failed += 1
        self._forget_ended()
        shape, sequences = failure.shape, failure.sequences
        smaller = shape is not None and self._compiled.give_up(shape)
        no_memory = smaller and _out_of_memory(failure.__cause__)
        again = len(sequences) == 1 and sequences[0].suspect is not None and sequences[0].suspect[0] == failure.kind
        if failure.kind in MOVES:
            # Pages move for one sequence at a time, which has no part in how; a second failure ends it all the same.
            for sequence in sequences:
                sequence.num_failed_writes += 1
            return [sequence for sequence in sequences if sequence.num_failed_writes >= MAX_FAILED_MOVES]
        for sequence, place in failure.places:
            sequence.suspect = failure.kind, place
        if shape is not None and smaller and not no_memory:
            self._blamed[shape] = set(sequences)
        if again and not no_memory:
            self._clear_shapes(lambda suspects: sequences[0] in suspects)
            return sequences
        return []

    def passed(self, kind: str, places: Places) -> None:
        """A step went well and its sequences are at these places now: suspects beyond the place of their failure are
        cleared.
        """
        self._num_failed = 0
        self._forget_ended()
        for sequence, place in places:
            if sequence.suspect is None or kind != _CLEARED_BY.get(sequence.suspect[0], sequence.suspect[0]):
                continue
            if place <= sequence.suspect[1]:
                continue
            sequence.suspect, sequence.num_accused = None, 0
            for shape, suspects in list(self._blamed.items()):
                suspects.discard(sequence)
                if not suspects:
                    self._judge(shape)

    def _judge(self, shape: Shape) -> None:
        """None of the shape's sequences was guilty: once may be an accident, but not twice."""
        del self._blamed[shape]
        if shape in self._acquitted:
            logger.warning("the shape %s is given up: its steps failed, but none of their requests does", shape)
        else:
            self._acquitted.add(shape)
            self._compiled.bring_back(shape)

    def acquit(self) -> None:
        """The device was at fault, not a shape."""
        self._clear_shapes(lambda suspects: True)

    def _forget_ended(self) -> None:
        self._clear_shapes(lambda suspects: all(sequence.final for sequence in suspects))

    def _clear_shapes(self, cleared: Callable[[set[Sequence]], bool]) -> None:
        """Shapes whose suspects say that they are not to blame are used again."""
        for shape in [shape for shape, suspects in self._blamed.items() if cleared(suspects)]:
            del self._blamed[shape]
            self._compiled.bring_back(shape)

    def must_prove(self) -> bool:
        """Whether so many steps have failed in a row that the worker must prove that it works; counts anew then."""
        many = self._num_failed >= MAX_FAILURES
        self._num_failed = 0 if many else self._num_failed
        return many


_CLEARED_BY = {"preemption": "decode"}
"""Kinds of steps that a sequence may never run again."""


def _out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class Bans:
    """Requests that are refused for `BAN_SECONDS`, since they made a step fail: clients retry by themselves."""

    def __init__(self) -> None:
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, request: Request) -> None:
        """Refuses the same prompt of the same task from now on."""
        self._until[_digest(request)] = time.monotonic() + BAN_SECONDS
        while len(self._until) > MAX_BANNED:
            self._until.popitem(last=False)

    def includes(self, request: Request) -> bool:
        """Whether the request is refused."""
        # Hashing a long prompt is not free, and there is hardly ever a ban.
        return bool(self._until) and self._until.get(_digest(request), 0.0) > time.monotonic()

    def check(self, request: Request) -> None:
        """Raises RequestBanned if the request is refused."""
        if self.includes(request):
            raise RequestBanned(
                f"This request made a device step fail, alone and twice, and is refused for {BAN_SECONDS:.0f} seconds; "
                "change the prompt, or see the server's log."
            )


def _digest(request: Request) -> bytes:
    tokens = struct.pack(f"<{len(request.prompt)}q", *request.prompt)
    return hashlib.sha256(
        f"{request.task}\0{request.response_start}\0".encode("utf-8", "surrogatepass") + tokens
    ).digest()
