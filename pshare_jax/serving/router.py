"""Chooses the workers of a request: the decode worker by task and load, the prefill worker by load.

The engine asks once per request and tells it when the request has ended. Load is the number of requests assigned and
not yet ended. Host-side, imports no jax.
"""

from collections.abc import Collection, Sequence


class Router:
    """Counts the requests on each worker and picks the least loaded (the first one among equals)."""

    def __init__(self, num_prefill: int, decode_tasks: Sequence[Collection[str]]):
        self.decode_tasks = decode_tasks
        self.prefill_load = [0] * num_prefill
        self.decode_load = [0] * len(decode_tasks)

    def assign(self, task: str) -> tuple[int, int]:
        """(prefill worker, decode worker) for one more request of a served task."""
        able = [i for i, tasks in enumerate(self.decode_tasks) if task in tasks]
        prefill = min(range(len(self.prefill_load)), key=self.prefill_load.__getitem__)
        decode = min(able, key=self.decode_load.__getitem__)
        return self.take(prefill, decode)

    def take(self, prefill: int, decode: int) -> tuple[int, int]:
        """Counts a request on workers that the caller chose."""
        self.prefill_load[prefill] += 1
        self.decode_load[decode] += 1
        return prefill, decode

    def release(self, prefill: int, decode: int) -> None:
        """The request has ended."""
        self.prefill_load[prefill] -= 1
        self.decode_load[decode] -= 1
