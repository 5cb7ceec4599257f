"""Prometheus metrics: GET /metrics.

Times and tokens by task are recorded when a request ends; everything else is read from the engine at each scrape.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pshare_jax.engine.compile_counter import compile_counter
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Sequence, State

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """All metrics of one engine; requests before this object was made (those of the warm-up) are not counted."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._queue = self._seconds(
            "pshare_queue_seconds", "Time from a request's arrival to its admission to prefill."
        )
        self._first = self._seconds(
            "pshare_time_to_first_token_seconds", "Time from a request's arrival to its first token."
        )
        self._whole = self._seconds("pshare_request_seconds", "Time from a request's arrival to its end.")
        self._token = Histogram(
            "pshare_time_per_output_token_seconds",
            "Mean time per output token after the first, for each request.",
            ("task",),
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )
        self._prompt = self._tokens("pshare_prompt_tokens", "Prompt tokens.")
        self._cached = self._tokens("pshare_cached_prompt_tokens", "Prompt tokens served from the prefix cache.")
        self._generated = self._tokens("pshare_generated_tokens", "Generated tokens.")
        self._ended = Counter(
            "pshare_requests", "Ended requests, by outcome.", ("task", "outcome"), registry=self._registry
        )
        self._registry.register(_EngineCollector(engine))
        engine.on_end.append(self.record_end)

    def record_end(self, sequence: Sequence) -> None:
        """Records an ended request; called under the engine's lock."""
        task, now = sequence.request.task, time.monotonic()
        self._ended.labels(task, sequence.state.value).inc()
        self._whole.labels(task).observe(now - sequence.came)
        if sequence.admitted is None:
            return
        self._queue.labels(task).observe(sequence.admitted - sequence.came)
        self._prompt.labels(task).inc(len(sequence.request.prompt))
        self._cached.labels(task).inc(sequence.cached_tokens)
        self._generated.labels(task).inc(len(sequence.completion_ids))
        if sequence.first_token is not None:
            self._first.labels(task).observe(sequence.first_token - sequence.came)
            if sequence.state is State.FINISHED and len(sequence.completion_ids) > 1:
                self._token.labels(task).observe(
                    (sequence.progressed - sequence.first_token) / (len(sequence.completion_ids) - 1)
                )

    def text(self) -> bytes:
        """The response to a scrape."""
        return generate_latest(self._registry)

    def _seconds(self, name: str, description: str) -> Histogram:
        return Histogram(name, description, ("task",), buckets=SECONDS, registry=self._registry)

    def _tokens(self, name: str, description: str) -> Counter:
        return Counter(name, description, ("task",), registry=self._registry)


class _EngineCollector:
    """Reads the engine's counters."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All metric families; the engine's are one consistent snapshot under its lock."""
        with self._engine.lock:
            families = [*self._requests(), *self._pages(), *self._prefill(), *self._decode(), *self._transfers()]
        yield from families
        compiles = compile_counter()
        yield CounterMetricFamily("pshare_compiled_programs", "Programs compiled or loaded by XLA.", compiles.count)
        yield CounterMetricFamily(
            "pshare_compile_seconds", "Time spent on compiling and loading them.", compiles.seconds
        )

    def _requests(self) -> Iterator[Metric]:
        requests = GaugeMetricFamily("pshare_live_requests", "Unfinished requests, by state.", labels=["state"])
        for state, count in self._engine.num_in_state.items():
            requests.add_metric([state.value], count)
        yield requests

    def _pages(self) -> Iterator[Metric]:
        pages = GaugeMetricFamily(
            "pshare_pages",
            "KV pages: used by live requests, cached in the prefix cache, or free.",
            labels=["pool", "state"],
        )
        published = CounterMetricFamily(
            "pshare_pages_published", "KV pages published to the prefix cache.", labels=["pool"]
        )
        for pool in self._engine.pools:
            for state, count in pool.num_in_state.items():
                pages.add_metric([pool.name, state], count)
            published.add_metric([pool.name], pool.cache_stats.num_published)
        yield from (pages, published)

    def _prefill(self) -> Iterator[Metric]:
        tokens = CounterMetricFamily("pshare_prefilled_tokens", "Tokens processed by prefill steps.", labels=["worker"])
        slots = CounterMetricFamily(
            "pshare_prefill_slots", "Slots of prefill steps, tokens and padding.", labels=["worker"]
        )
        seconds = CounterMetricFamily(
            "pshare_prefill_seconds", "Time during which prefill steps ran.", labels=["worker"]
        )
        for worker in self._engine.prefill_workers:
            tokens.add_metric([str(worker.index)], worker.stats.tokens)
            slots.add_metric([str(worker.index)], worker.stats.slots)
            seconds.add_metric([str(worker.index)], worker.speed.seconds)
        yield from (tokens, slots, seconds)

    def _decode(self) -> Iterator[Metric]:
        steps = CounterMetricFamily("pshare_decode_steps", "Decode steps.", labels=["worker"])
        tokens = CounterMetricFamily("pshare_decoded_tokens", "Tokens generated by decode steps.", labels=["worker"])
        scored = CounterMetricFamily("pshare_scored_tokens", "Prompt tokens scored.", labels=["worker"])
        preempted = CounterMetricFamily(
            "pshare_preemptions", "Requests preempted because the pool was full.", labels=["worker"]
        )
        for worker in self._engine.decode_workers:
            steps.add_metric([str(worker.index)], worker.num_steps)
            tokens.add_metric([str(worker.index)], worker.num_tokens)
            scored.add_metric([str(worker.index)], worker.num_scored)
            preempted.add_metric([str(worker.index)], worker.num_preempted)
        served = GaugeMetricFamily(
            "pshare_served_tasks", "1 for each task available to new requests.", labels=["task", "worker"]
        )
        for worker in self._engine.decode_workers:
            for task in worker.tasks:
                served.add_metric([task, str(worker.index)], 1)
        yield from (steps, tokens, scored, preempted, served)

    def _transfers(self) -> Iterator[Metric]:
        counters = {
            "pshare_transfers": ("Completed KV transfers.", "count"),
            "pshare_transferred_pages": ("KV pages transferred.", "num_pages"),
            "pshare_transferred_bytes": ("KV bytes transferred.", "num_bytes"),
            "pshare_transfer_seconds": ("Total time of KV transfers, from dispatch to scatter.", "seconds"),
            "pshare_transfer_failures": ("Failed KV transfers.", "failures"),
        }
        for name, (description, field) in counters.items():
            family = CounterMetricFamily(name, description, labels=["decode_worker"])
            for index, transfer in enumerate(self._engine.transfers):
                family.add_metric([str(index)], getattr(transfer.stats, field))
            yield family
        in_flight = GaugeMetricFamily("pshare_transfers_in_flight", "KV transfers in flight.", labels=["decode_worker"])
        for index, transfer in enumerate(self._engine.transfers):
            in_flight.add_metric([str(index)], transfer.in_flight)
        yield in_flight
