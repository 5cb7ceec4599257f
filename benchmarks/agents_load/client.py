"""One call to an OpenAI-compatible server, streamed, and what it took. Nothing is tried again: a failure is a result."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.agents_load.config import Numbers
from benchmarks.agents_load.workload import Call

WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "state", "group")
"""The text of a token id in a chat, where a prompt cannot be ids; its length in tokens is then about that of the prompt."""


@dataclass
class CallRecord:
    """A call's outcome. Times are seconds of `time.perf_counter`, `gaps` those between its chunks; counts are the server's
    `usage`. `failure` names what went wrong (a fixed set), `detail` says more.
    """

    session: str
    call: Call
    began: float
    first: float | None = None
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    failure: str | None = None
    detail: str = ""

    @property
    def seconds(self) -> float:
        """From sending to the end."""
        return self.ended - self.began

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens that the server computed for it: the prompt's last token is the decode module's."""
        return max(self.prompt_tokens - 1 - self.cached_tokens, 0)

    def numbers(self, start: float) -> Numbers:
        """Everything but the prompt, for a file; `began_s` is from the run's start, all other seconds from `began`."""
        return {
            "session": self.session,
            "model": self.call.model,
            "began_s": self.began - start,
            "ttft_s": None if self.first is None else self.first - self.began,
            "seconds": self.seconds,
            "gaps_s": self.gaps,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            "failure": self.failure,
            "detail": self.detail,
        }


class Failed(Exception):
    """A failed call: its kind, and more."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Client:
    """Sends calls to one server: a URL that ends in /v1, or one for each model. `chat`: prompts as messages of words."""

    def __init__(self, url: str | dict[str, str], *, chat: bool, api_key: str | None, call_seconds: float):
        self._url, self._chat, self._call_seconds = url, chat, call_seconds
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Sessions may be more than httpx's default of connections.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(headers=headers, limits=limits, timeout=call_seconds, trust_env=False)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def send(self, session: str, call: Call) -> CallRecord:
        """Sends a call and waits for its end; only a cancellation raises."""
        record = CallRecord(session, call, time.perf_counter())
        try:
            async with asyncio.timeout(self._call_seconds):
                await self._stream(record)
            self._check(record)
        except Failed as failed:
            record.failure, record.detail = failed.kind, failed.detail
        except (TimeoutError, httpx.TimeoutException):
            record.failure, record.detail = "timeout", f"not ended after {self._call_seconds:g} s"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            record.failure, record.detail = type(error).__name__, str(error)
        record.ended = record.ended or time.perf_counter()
        return record

    async def _stream(self, record: CallRecord) -> None:
        call = record.call
        root = self._url if isinstance(self._url, str) else self._url[call.model]
        url = f"{root.rstrip('/')}/{'chat/completions' if self._chat else 'completions'}"
        headers = {"x-session-id": record.session}
        async with self._http.stream("POST", url, json=self._body(call), headers=headers) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise Failed(f"HTTP {response.status_code}", text[:300])
            last = None
            async for chunk in _chunks(response):
                now = time.perf_counter()
                if chunk.get("choices"):
                    record.ended = now
                if _has_text(chunk):
                    if last is not None:
                        record.gaps.append(now - last)
                    record.first, last = record.first or now, now
                if chunk.get("usage"):
                    _count(record, chunk["usage"])

    def _body(self, call: Call) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt": list(call.prompt)}
        if self._chat:
            text = " ".join(WORDS[token % len(WORDS)] for token in call.prompt)
            prompt = {"messages": [{"role": "user", "content": text}]}
        settings = {"max_tokens": call.output, "temperature": 0, "ignore_eos": True, "stream": True}
        return {"model": call.model, **prompt, **settings, "stream_options": {"include_usage": True}}

    def _check(self, record: CallRecord) -> None:
        call = record.call
        if record.completion_tokens != call.output:
            raise Failed("answer of another length", f"{record.completion_tokens} tokens instead of {call.output}")
        if not self._chat and record.prompt_tokens != len(call.prompt):
            raise Failed("prompt of another length", f"{record.prompt_tokens} tokens instead of {len(call.prompt)}")


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream, which must end with [DONE]."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if not line.startswith("data:"):
            continue
        try:
            chunk = json.loads(data)
        except json.JSONDecodeError:
            raise Failed("broken stream", data[:300]) from None
        if "error" in chunk:
            raise Failed("error in the stream", json.dumps(chunk["error"])[:300])
        yield chunk
    raise Failed("broken stream", "it ended without [DONE]")


def _has_text(chunk: dict[str, Any]) -> bool:
    """Whether it brings text; roles, finish reasons and usage come in chunks of their own."""
    choices = chunk.get("choices") or [{}]
    return bool(choices[0].get("text") or (choices[0].get("delta") or {}).get("content"))


def _count(record: CallRecord, usage: dict[str, Any]) -> None:
    record.prompt_tokens, record.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
