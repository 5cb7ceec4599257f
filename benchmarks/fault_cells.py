"""The cells of the fault table: stages of a request's life, faults, why a cell makes no sense, and which requests may fail."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.fault_points import Death, Fault, Injected, Point
from pshare_jax.engine.config import placed

PLACEMENTS = {
    "split": placed([[0]], [[2]]),
    "colocated": placed([[0]], [[0]]),
    "2 + 2": placed([[0], [1]], [[2], [3]]),
}

# --- faults -------------------------------------------------------------------------------------------------------------


def exception(fault: Fault, point: Point) -> Any:
    """The operation raises."""
    assert point.fail is not None
    return point.fail(Injected("an injected failure"))


def out_of_memory(fault: Fault, point: Point) -> Any:
    """The operation raises as XLA does."""
    assert point.fail is not None
    return point.fail(Injected("RESOURCE_EXHAUSTED: an injected failure"))


def late_failure(fault: Fault, point: Point) -> Any:
    """The operation is dispatched, and its result raises when it is read."""
    assert point.late is not None
    return point.late(Injected("an injected late failure"))


def delay(fault: Fault, point: Point) -> Any:
    """The result is late, or the other workers take turns while the operation runs."""
    assert point.delay is not None
    return point.delay()


def drop(fault: Fault, point: Point) -> Any:
    """The result never arrives."""
    assert point.drop is not None
    return point.drop()


def duplicate(fault: Fault, point: Point) -> Any:
    """The operation happens twice."""
    result = point.go()
    point.go()
    return result


def thread_death(fault: Fault, point: Point) -> Any:
    """The worker's thread ends here."""
    raise Death("an injected death")


def client_gone(fault: Fault, point: Point) -> Any:
    """The client hangs up at this moment."""
    assert fault.victim is not None
    # The abort of a client that gets an event waits for the lock.
    result = point.go() if point.stage == "delivery of an event" else None
    fault.engine.abort(fault.victim.request.id)
    return point.go() if point.stage != "delivery of an event" else result


FAULTS: dict[str, tuple[Callable[[Fault, Point], Any], bool]] = {
    "exception": (exception, False),
    "exception each time": (exception, True),
    "out of memory": (out_of_memory, False),
    "out of memory each time": (out_of_memory, True),
    "late failure": (late_failure, False),
    "late failure each time": (late_failure, True),
    "delay": (delay, False),
    "drop": (drop, False),
    "duplicate": (duplicate, False),
    "thread death": (thread_death, False),
    "thread death for good": (thread_death, False),
    "client gone": (client_gone, False),
}
"""By name, what happens, and whether it happens to the victim each time."""
TRANSFER = ("gather", "device_put", "arrival", "scatter")
RETURN = tuple(f"return: {stage}" for stage in TRANSFER)
PREEMPTION = ("preemption: save", "preemption: restore")
STEPS = ("prefill step", "scoring step", "decode step")
HOST = ("admission", "start of decoding", "sampling on the host", "delivery of an event")
STAGES = (
    *("submit", "admission", "prefill step", *TRANSFER, *RETURN, "start of decoding"),
    *(*PREEMPTION, "scoring step", "decode step", "sampling on the host", "delivery of an event", "wake-up"),
)


def why_not(placement: str, stage: str, fault: str) -> str | None:
    """Why a cell makes no sense; None if it is run."""
    kind = fault.removesuffix(" each time").removesuffix(" for good")
    if placement == "colocated" and stage in (*TRANSFER, *RETURN):
        return "colocated workers share one pool: no pages are sent"
    if placement == "2 + 2" and stage in PREEMPTION:
        return "the pool of one worker is full, as in the split placement"
    if stage == "submit":
        return _WHY_NOT_SUBMIT.get(fault)
    if stage == "wake-up":
        return (
            None
            if fault == "duplicate"
            else "a lost or failed wake-up needs threads (tests/engine/test_engine_threads.py)"
        )
    if kind in ("out of memory", "late failure") and stage in HOST:
        return "host code: an error is the exception"
    if stage in ("admission", "start of decoding") and fault == "exception each time":
        return "the worker's thread dies each time, and the fifth time for good: see thread death for good"
    if fault == "late failure each time" and (stage.endswith("scatter") or stage == "preemption: restore"):
        return "a copy depends on no request; its failure shows in the next step over the pool, whose requests are suspected"
    if stage.endswith("device_put") and kind == "late failure":
        return "the failure shows at the arrival"
    if stage.endswith("arrival") and kind == "out of memory":
        return "memory is taken by device_put"
    if stage.endswith("arrival") and kind == "duplicate":
        return "reading it twice changes nothing; a double write is at the scatter"
    if kind == "drop" and not stage.endswith("arrival"):
        return "device calls and host code end or raise; a call that hangs stalls its worker, which /health reports"
    if kind == "delay" and stage in ("start of decoding", "sampling on the host", "delivery of an event"):
        return "host code under the lock, or without a wait"
    if stage == "delivery of an event" and kind in ("thread death", "duplicate"):
        return "the client's function: only its exceptions reach the engine"
    if stage == "start of decoding" and kind == "duplicate":
        return "a list of sequences that have left: see wake-up"
    return None


_WHY_NOT_SUBMIT = {
    "exception each time": "each submission is a request of its own",
    "out of memory": "no device memory is taken",
    "out of memory each time": "no device memory is taken",
    "late failure": "no device step",
    "late failure each time": "no device step",
    "delay": "a later arrival is another order of arrivals",
    "drop": "the call returns or raises",
    "thread death": "runs in the caller's thread",
    "thread death for good": "runs in the caller's thread",
}


def may_fail(placement: str, stage: str, fault: str) -> str:
    """Which requests may fail: "none", "victim", "waiters" (the victim and those that wait for its pages) or "worker"."""
    if fault == "drop":
        return "waiters"
    if fault == "thread death for good":
        return "none" if placement == "2 + 2" else "worker"
    if fault.endswith("each time"):
        return "victim"
    if fault == "exception" and stage in ("submit", "sampling on the host", "delivery of an event"):
        return "victim"
    return "none"


@dataclasses.dataclass(frozen=True)
class Cell:
    """A stage and a fault in a placement; seeds differ in the order of arrivals and workers, and in the victim."""

    placement: str
    stage: str
    fault: str
    seed: int = 0


def cells(placements: Iterable[str] = tuple(PLACEMENTS), seed: int = 0) -> list[Cell]:
    """All cells that make sense."""
    every = itertools.product(placements, STAGES, FAULTS)
    return [Cell(*names, seed) for names in every if why_not(*names) is None]
