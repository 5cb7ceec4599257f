"""README's way from a file of conversations to a served task, its own data and config, on a tiny base."""

import json
import os
import re
import subprocess
import sys

from server_process import CHAT, ROOT, serving
from tiny import tiny_folder

SECTION = "### Your own JSONL, a module, a served task"
# A model of random weights learns whole sentences only with large steps.
TINY = ("optimizer.learning_rate=2e-2", "data.epochs=60", "data.max_len=256")


def readme_blocks() -> tuple[str, str]:
    """The data and the config that README gives."""
    section = (ROOT / "README.md").read_text().split(SECTION)[1].split("\n## ")[0]
    blocks = dict(re.findall(r"```(json|yaml)\n(.*?)```", section, re.DOTALL))
    return blocks["json"], blocks["yaml"]


def test_own_jsonl_becomes_a_served_task(tmp_path):
    data, config = readme_blocks()
    (tmp_path / "my.jsonl").write_text(data)
    (tmp_path / "my.yaml").write_text(config)
    base = tiny_folder("llama", tmp_path / "base")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--config", "my.yaml", f"base={base}", *TINY]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 of 3 records used" in run.stdout
    module = tmp_path / "runs" / "mine" / "module"
    asked = [json.loads(line)["messages"] for line in data.splitlines()]
    with serving(base, {"chat": "base", "mine": module}, tmp_path) as server:
        for question, answer in asked:
            told = [server.ask(CHAT, model=task, messages=[question], max_tokens=64) for task in ("mine", "chat")]
            assert told[0][:2] == (answer["content"], "stop")
            assert told[1][0] != answer["content"]
            ids = server.shared.model.tokenizer.encode_chat([question])
            assert told[0] == server.expected("mine", ids, 64)
