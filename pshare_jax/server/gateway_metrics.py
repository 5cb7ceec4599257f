"""The load of this server under the names that inference gateways read to choose among servers.

llm-d's and the Gateway API inference extension's endpoint picker scrape vLLM's names by default; each has one sample.
"""

import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from pshare_jax.engine.engine import Engine
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.sequence import State

QUEUED = (State.WAITING, State.PREEMPTED)


class GatewayCollector:
    """Reads the engine's state; `model` is the base's name, which stands for the whole server."""

    def __init__(self, engine: Engine, model: str):
        self._engine, self._model = engine, model

    def collect(self) -> Iterator[Metric]:
        """The metrics, from one snapshot under the engine's lock."""
        engine = self._engine
        with engine.lock:
            counts = engine.num_in_state
            sides = [_share_in_use(pools) for pools in (engine.admission.prefill_pools, engine.admission.decode_pools)]
            tasks, pools = list(engine.tasks), engine.pools
        waiting = sum(counts[state] for state in QUEUED)
        yield self._gauge("num_requests_waiting", "Requests in the queue, preempted requests included.", waiting)
        yield self._gauge("num_requests_running", "Admitted requests.", sum(counts.values()) - waiting)
        usage = "Share of the KV pages that live requests use (0 to 1), of the fuller of the prefill and decode sides."
        for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
            yield self._gauge(name, usage, max(sides))
        labels = {"max_lora": str(len(tasks)), "running_lora_adapters": _joined(tasks), "waiting_lora_adapters": ""}
        yield _info("vllm:lora_requests_info", "The tasks, all of which are loaded.", labels, time.time())
        labels = {"block_size": str(engine.page_size), "num_gpu_blocks": str(sum(pool.num_usable for pool in pools))}
        yield _info("vllm:cache_config_info", "Tokens of a KV page, and pages of all pools.", labels, 1)

    def _gauge(self, name: str, description: str, value: float | int) -> Metric:
        return _info(f"vllm:{name}", description, {"model_name": self._model}, value)


def _info(name: str, description: str, labels: dict[str, str], value: float | int) -> Metric:
    family = GaugeMetricFamily(name, description, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def _share_in_use(pools: Sequence[Pool]) -> float:
    used = sum(pool.num_in_state["used"] for pool in pools)
    return used / sum(pool.num_usable for pool in pools)


def _joined(tasks: list[str]) -> str:
    """Readers split at commas, so a name with a comma is left out."""
    return ",".join(task for task in tasks if "," not in task)
