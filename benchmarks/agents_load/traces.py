"""Traces in Mooncake's format, one JSON object a line, as AIPerf and Dynamo replay them.

    {"session_id": "s0", "timestamp": 0.0, "input_length": 2080, "output_length": 16, "hash_ids": [0, 1, 2],
     "extra": {"model": "task0"}}

Times are milliseconds. A hash id names a block of the prompt and all blocks before it: prompts that begin alike have the
same leading ids. Every line has its whole prompt; within a session a line follows the one before, `delay` after its end.
AIPerf merges `extra` into the request, which is how a line names its model.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.agents_load.workload import Call, Session
from pshare_jax.errors import PshareError

Sent = tuple[str, float, Call]
"""A call as it was sent: its session's name, and the seconds from the start of the run."""


def write_trace(path: Path, sent: Iterable[Sent], block_size: int) -> None:
    """Writes calls in the order of their times."""
    ids: dict[tuple[int, tuple[int, ...]], int] = {}
    seen: set[str] = set()
    lines = []
    for session, seconds, call in sorted(sent, key=lambda one: one[1]):
        line: dict[str, Any] = {"session_id": session, "timestamp": round(seconds * 1000, 3)}
        if session in seen:
            line["delay"] = round(call.delay * 1000, 3)
        seen.add(session)
        line |= {"input_length": len(call.prompt), "output_length": call.output}
        line |= {"hash_ids": _hash_ids(call.prompt, block_size, ids), "extra": {"model": call.model}}
        lines.append(json.dumps(line))
    path.write_text("".join(f"{line}\n" for line in lines))


def _hash_ids(prompt: Sequence[int], block_size: int, ids: dict[tuple[int, tuple[int, ...]], int]) -> list[int]:
    found, parent = [], -1
    for start in range(0, len(prompt), block_size):
        parent = ids.setdefault((parent, tuple(prompt[start : start + block_size])), len(ids))
        found.append(parent)
    return found


def read_trace(path: Path, block_size: int, vocab_size: int, seed: int, models: Sequence[str]) -> list[Session]:
    """The sessions of a trace, with arrivals; lines without a session are sessions of one call, and lines without a model
    take `models` in turn. Equal hash ids become equal tokens, drawn by `seed`.

    Raises:
        PshareError: the file cannot be read, or a line not be replayed.
    """
    try:
        texts = [(number, text) for number, text in enumerate(path.read_text().splitlines()) if text.strip()]
    except OSError as error:
        raise PshareError(f"Cannot read the trace {path}: {error.strerror}.") from None
    lines = [(number, _parsed(text, f"line {number + 1} of {path}")) for number, text in texts]
    if not lines:
        raise PshareError(f"The trace {path} is empty.")
    begin = min(line.get("timestamp", 0) for _, line in lines)
    calls: dict[str, list[Call]] = {}
    arrivals: dict[str, float] = {}
    for number, line in lines:
        name = str(line.get("session_id", f"line-{number + 1}"))
        seconds = (line.get("timestamp", begin) - begin) / 1000
        first = name not in calls
        delay = 0.0 if first else line.get("delay", 0) / 1000
        earliest = 0.0 if first or "delay" in line else seconds
        model = line.get("model") or line.get("extra", {}).get("model") or models[number % len(models)]
        prompt = _prompt(line, number, block_size, vocab_size, seed)
        calls.setdefault(name, []).append(Call(model, prompt, line["output_length"], delay, earliest))
        arrivals.setdefault(name, seconds)
    return [Session(name, tuple(calls[name]), arrival) for name, arrival in arrivals.items()]


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        raise PshareError(f"{where} is not JSON.") from None
    for name in ("input_length", "output_length"):
        if not isinstance(line, dict) or type(line.get(name)) is not int or line[name] < 1:
            raise PshareError(f"{where} has no {name} of at least 1; only lines with lengths can be replayed.")
    return line


def _prompt(line: dict[str, Any], number: int, block_size: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    def tokens(count: int, *key: int) -> list[int]:
        return np.random.default_rng([seed, *key]).integers(0, vocab_size, count).tolist()

    length = line["input_length"]
    blocks = [tokens(block_size, hash_id) for hash_id in line.get("hash_ids") or []]
    prompt = [token for block in blocks for token in block][:length]
    # What no hash id covers is the line's own.
    return tuple(prompt + tokens(length - len(prompt), number, 1))
