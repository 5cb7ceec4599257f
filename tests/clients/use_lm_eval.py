"""lm-eval on the local task files: its own `local-completions`, and the class of docs/pshare_lm_eval.py. Prints all samples."""

import json
import os
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

os.environ["HF_DATASETS_OFFLINE"] = "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "docs"))
import pshare_lm_eval  # noqa: E402, F401

url, task = sys.argv[1:]


def samples_of(model, concurrent):
    with tempfile.TemporaryDirectory() as folder:
        for file in (HERE / "lm_eval_tasks").glob("*.yaml"):
            data = HERE / "lm_eval_tasks" / "data.jsonl"
            (Path(folder) / file.name).write_text(file.read_text().replace("DATA", str(data)))
        arguments = {
            "model": task,
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "remote",
            "tokenized_requests": True,
            "max_length": 512,
            "batch_size": 3,
            "num_concurrent": concurrent,
        }
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=["choices", "texts"],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    return {
        name: [
            [list(args), answers[0]]
            for sample in found
            for args, answers in zip(
                [list(value.values()) for value in sample["arguments"].values()]
                if isinstance(sample["arguments"], dict)
                else sample["arguments"],
                sample["resps"],
                strict=True,
            )
        ]
        for name, found in results["samples"].items()
    }


print(json.dumps([samples_of("local-completions", 1), samples_of("pshare-completions", 4)]))
