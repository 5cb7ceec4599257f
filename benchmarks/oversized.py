"""How long a running server is silent while it gets oversized requests: `python -m benchmarks.oversized URL MODEL`.

Another client polls /health every 20 ms and a third reads a stream of one token after another; for each kind of body the
table has its status, its seconds, and the longest gap of both observers while it was answered.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

CHAT, TEXT, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
POLL_SECONDS = 0.02


class Observer:
    """A thread that notes when something arrived; `worst` is the longest time without, since `reset`."""

    def __init__(self, arrivals: Callable[[], Iterator[Any]]):
        self._arrivals, self._stopped = arrivals, False
        self._last, self._worst = time.perf_counter(), 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reset(self) -> None:
        """Forgets the gaps so far."""
        self._last, self._worst = time.perf_counter(), 0.0

    @property
    def worst(self) -> float:
        """Seconds, the gap that is still open included."""
        return max(self._worst, time.perf_counter() - self._last)

    def stop(self) -> None:
        """Ends the thread at the next arrival."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        for _ in self._arrivals():
            now = time.perf_counter()
            self._worst, self._last = max(self._worst, now - self._last), now
            if self._stopped:
                return


def polls(url: str) -> Iterator[int]:
    """Statuses of /health."""
    with httpx.Client(base_url=url, timeout=120) as client:
        while True:
            yield client.get("/health").status_code
            time.sleep(POLL_SECONDS)


def tokens(url: str, model: str) -> Iterator[str]:
    """Lines of streams, one after another."""
    with httpx.Client(base_url=url, timeout=120) as client:
        while True:
            body = {"model": model, "prompt": "One, two,", "stream": True, "max_tokens": 1000, "ignore_eos": True}
            with client.stream("POST", TEXT, json=body) as response:
                yield from (line for line in response.iter_lines() if line)


UNITS = {
    "words": "the quick brown fox ",
    "one letter": "a",
    "spaces": " ",
    "digits": "1234567890",
    "newlines": "\n",
    "emoji": "😀",
    "control tokens": "<|im_end|>",
}
"""Texts of kinds that tokenizers treat differently, to be repeated."""


def cases(size: int, model: str) -> Iterator[tuple[str, str, Any]]:
    """(name, path, body) of about `size` bytes each."""
    for name, unit in UNITS.items():
        text = unit * (size // len(unit.encode()))
        yield f"prompt: {name}", TEXT, {"model": model, "prompt": text, "max_tokens": 1}
    words = UNITS["words"] * (size // 20)
    for name, unit in UNITS.items():
        text = unit * (size // len(unit.encode()))
        messages = [{"role": "user", "content": text}]
        yield f"chat: {name}", CHAT, {"model": model, "messages": messages, "max_tokens": 1}
    quarter = [{"role": "user", "content": words[: size // 4]}]
    yield "chat: a quarter of words", CHAT, {"model": model, "messages": quarter, "max_tokens": 1}
    short = [{"role": ("user", "assistant")[i % 2], "content": "hi"} for i in range(60_001)]
    yield "60,001 messages", CHAT, {"model": model, "messages": short, "max_tokens": 1}
    yield "1 M token ids", TEXT, {"model": model, "prompt": [5] * 1_000_000, "max_tokens": 1}
    yield "50,000 brackets", TEXT, b"[" * 50_000
    yield "tokenize: words", TOKENIZE, {"prompt": words}
    yield "tokenize: digits", TOKENIZE, {"prompt": "1234567890" * (size // 10)}
    yield "tokenize: texts of tokens", TOKENIZE, {"prompt": words, "return_token_strs": True}
    yield "detokenize: 1 M ids", DETOKENIZE, {"tokens": [5000] * 1_000_000}
    scored = {"model": model, "prompt": [5000] * 2000, "max_tokens": 0, "echo": True, "logprobs": 20}
    yield "echo: 2,000 tokens, 20 logprobs", TEXT, scored
    yield "echo: the same, streamed", TEXT, {**scored, "stream": True}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--bytes", type=int, default=4_000_000)
    options = parser.parse_args()
    health = Observer(lambda: polls(options.url))
    stream = Observer(lambda: tokens(options.url, options.model))
    time.sleep(5)
    print(f"idle: longest gap of /health {health.worst:.3f} s, of the stream {stream.worst:.3f} s\n")
    print(
        "| body | status | answered after s | /health: longest gap s | stream: longest gap s |\n|---|---|---|---|---|"
    )
    with httpx.Client(base_url=options.url, timeout=300) as client:
        for name, path, body in cases(options.bytes, options.model):
            raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
            health.reset()
            stream.reset()
            began = time.perf_counter()
            response = client.post(path, content=raw, headers={"Content-Type": "application/json"})
            seconds = time.perf_counter() - began
            time.sleep(0.1)
            gaps = f"{health.worst:.2f} | {stream.worst:.2f}"
            print(f"| {name} | {response.status_code} | {seconds:.2f} | {gaps} |", flush=True)
    health.stop()
    stream.stop()


if __name__ == "__main__":
    main()
