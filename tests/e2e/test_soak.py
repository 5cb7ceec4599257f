"""Five minutes of 64 streams, 16 slow readers, 16 clients that hang up, 8 that score and 12 that ask for one token, against
the real server: `pytest -m slow tests/e2e`.

Nothing may hang or fail, memory must not grow and every page must come back. PSHARE_SOAK_MINUTES shortens or lengthens it.
"""

import asyncio
import faulthandler
import itertools
import json
import os
import random
import re
import socket
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from server_process import CHAT, TEXT, serving
from tiny import tiny_folder, tiny_module

MINUTES = float(os.environ.get("PSHARE_SOAK_MINUTES", "5"))
STREAMS, SLOW, LEAVING, SCORING, SHORT = 64, 16, 16, 8, 12
GROWTH_MB = 50
TASKS = ("chat", "math", "tools")
LONGEST_SECONDS = 120.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES + 300)]


class Soak:
    """All clients of a server until `ends`, and what they saw."""

    def __init__(self, url: str, ends: float):
        self.url, self.ends = url, ends
        self.done = dict.fromkeys(("streams", "slow", "left", "scored", "short"), 0)
        self.longest = 0.0
        self.first: list[float] = []
        self.gaps: list[float] = []
        """The longest time between two tokens of each stream."""

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.url, timeout=LONGEST_SECONDS, limits=limits) as client:
            await asyncio.gather(
                *(self.stream(client, random.Random(number)) for number in range(STREAMS)),
                *(self.read_slowly(random.Random(1000 + number)) for number in range(SLOW)),
                *(self.leave(client, random.Random(2000 + number)) for number in range(LEAVING)),
                *(self.score(client, random.Random(3000 + number)) for number in range(SCORING)),
                *(self.ask_for_one(client, random.Random(4000 + number)) for number in range(SHORT)),
            )

    def body(self, draw: random.Random, most: int = 60) -> dict:
        """Growing contexts of ten sessions: much is shared, much is new."""
        session, turns = draw.randrange(10), draw.randint(1, 6)
        prompt = [(session * 31 + index * 7) % 300 + 10 for index in range(turns * 40)] + [draw.randrange(10, 300)]
        return {
            "model": draw.choice(TASKS),
            "prompt": prompt,
            "max_tokens": draw.randint(1, most),
            "temperature": draw.choice([0.0, 1.0]),
            "stream": True,
            "ignore_eos": True,
            "user": str(session),
            "stream_options": {"include_usage": True},
        }

    async def stream(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        while time.monotonic() < self.ends:
            body, began = self.body(draw), time.monotonic()
            async with client.stream("POST", TEXT, json=body) as response:
                assert response.status_code == 200
                lines, times = [], []
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        lines.append(line)
                        times.append(time.monotonic())
            self.longest = max(self.longest, times[-1] - began)
            self.first.append(times[0] - began)
            self.gaps.append(max(after - before for before, after in itertools.pairwise(times)))
            assert lines[-1] == "data: [DONE]"
            assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == body["max_tokens"]
            self.done["streams"] += 1

    async def leave(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        while time.monotonic() < self.ends:
            async with client.stream("POST", TEXT, json=self.body(draw, 200)) as response:
                lines = response.aiter_lines()
                for _ in range(draw.randint(1, 20)):
                    await anext(lines, None)
            self.done["left"] += 1

    async def score(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        while time.monotonic() < self.ends:
            body = {
                **self.body(draw),
                "stream": False,
                "stream_options": None,
                "max_tokens": 0,
                "echo": True,
                "logprobs": 1,
            }
            response = await client.post(TEXT, json=body)
            assert response.status_code == 200, response.text
            assert len(response.json()["choices"][0]["logprobs"]["token_logprobs"]) == len(body["prompt"])
            self.done["scored"] += 1

    async def ask_for_one(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        while time.monotonic() < self.ends:
            body = {**self.body(draw), "stream": False, "stream_options": None, "max_tokens": 1}
            response = await client.post(TEXT, json=body)
            assert response.status_code == 200, response.text
            self.done["short"] += 1

    async def read_slowly(self, draw: random.Random) -> None:
        """A few bytes at a time through a small window, of an answer with many bytes a token."""
        parts = urlsplit(self.url)
        while time.monotonic() < self.ends:
            end = socket.socket()
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            end.setblocking(False)
            await asyncio.get_running_loop().sock_connect(end, (parts.hostname, parts.port))
            reader, writer = await asyncio.open_connection(sock=end, limit=2048)
            content = json.dumps({**self.body(draw, 100), "logprobs": 20}).encode()
            head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            tail = b""
            try:
                while data := await asyncio.wait_for(reader.read(2048), LONGEST_SECONDS):
                    tail = (tail + data)[-64:]
                    await asyncio.sleep(0.02)
            finally:
                writer.close()
            assert b"data: [DONE]" in tail
            self.done["slow"] += 1


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


async def memory(pid: int, ends: float, sizes: list[tuple[float, float]]) -> None:
    began = time.monotonic()
    while time.monotonic() < ends:
        sizes.append(((time.monotonic() - began) / 60, resident_mb(pid)))
        await asyncio.sleep(5)


def pages(client: httpx.Client, state: str) -> float:
    text = client.get("/metrics").text
    return sum(float(value) for value in re.findall(rf'pshare_pages{{.*state="{state}"}} ([\d.e+]+)', text))


def test_nothing_hangs_leaks_or_is_lost(tmp_path):
    # The dump of stacks is for tests that take less than four minutes.
    faulthandler.cancel_dump_traceback_later()
    base = tiny_folder("llama", tmp_path / "base")
    modules = {
        "chat": "base",
        "math": tiny_module(base, tmp_path / "full"),
        "tools": tiny_module(base, tmp_path / "lora", kind="lora"),
    }
    # Pools that cannot hold all, so that pages are evicted and answers preempted.
    with serving(base, modules, tmp_path, kv={"page_size": 16, "pages": 700}, server={"log_requests": False}) as server:
        soak, sizes = Soak(server.url, time.monotonic() + 60 * MINUTES), []

        async def all_of_it() -> None:
            await asyncio.gather(soak.run(), memory(server.process.pid, soak.ends, sizes))

        asyncio.run(all_of_it())
        limit = time.monotonic() + 30
        while pages(server.client, "used") and time.monotonic() < limit:
            time.sleep(0.1)
        assert pages(server.client, "used") == 0
        assert pages(server.client, "free") + pages(server.client, "cached") == 2 * 699
        metrics = server.client.get("/metrics").text
        preempted = re.search(r'pshare_preemptions_total{worker="0"} ([\d.]+)', metrics)
        early = max(size for minute, size in sizes if minute <= 2 * MINUTES / 5)
        late = sizes[-1][1]
        print(
            f"\n{soak.done}, longest stream {soak.longest:.1f} s, longest gap {max(soak.gaps):.2f} s (median of the streams' "
            f"{statistics.median(soak.gaps):.2f} s), first token after {statistics.median(soak.first):.2f} s, at most "
            f"{max(soak.first):.2f} s, preemptions {preempted and preempted[1]}, "
            f"RSS {early:.0f} MB after {2 * MINUTES / 5:.1f} min, {late:.0f} MB after {sizes[-1][0]:.1f} min"
        )
        assert late - early <= GROWTH_MB
        assert all(soak.done.values())
        messages = [{"role": "user", "content": "still there?"}]
        assert server.ask(CHAT, model="math", messages=messages, max_tokens=4)[2] == 4
