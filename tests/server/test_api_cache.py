"""The prefix cache as clients see it: cached_tokens on every path, salts, sessions."""

import json

import pytest
from fake_server import PAGE, PATHS, pieces, serving

pytestmark = pytest.mark.host

TASKS = ("abc", "org/math-v1.5", "abc")
NUM_PAGES = 10


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def prompt_of(path, text):
    """A prompt of so many tokens in the form of its endpoint: the fake template adds nothing."""
    return {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}


def usage(server, path, stream, **body):
    """The usage that a client is told, checked to be the same in each chunk that carries it."""
    if not stream:
        return server.client.post(path, json=body).json()["usage"]
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = server.stream(path, **body, stream_options=options)
    details = {json.dumps(chunk["usage"]["prompt_tokens_details"]) for chunk in chunks if any(pieces([chunk]))}
    assert details == {json.dumps(chunks[-1]["usage"]["prompt_tokens_details"])}
    return chunks[-1]["usage"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_cached_tokens(server, path, stream, extra):
    """Case A2-19: nothing when cold, then whole pages, for every task; always there, never the whole prompt."""
    text = f"{extra} {stream} {path} ".ljust(NUM_PAGES * PAGE + extra, "x")
    told = [usage(server, path, stream, model=task, **prompt_of(path, text)) for task in TASKS]
    assert [one["prompt_tokens"] for one in told] == [len(text)] * 3
    full = (len(text) - 1) // PAGE * PAGE
    assert [one["prompt_tokens_details"] for one in told] == [{"cached_tokens": cached} for cached in (0, full, full)]
    assert all(one["total_tokens"] == one["prompt_tokens"] + one["completion_tokens"] for one in told)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_salts_part_tenants(server, path, stream):
    """Case A2-09: the same salt hits and another one misses."""
    text = f"{stream} {path} salted ".ljust(3 * PAGE + 1, "x")
    salts = ["one", "two", "one", None, "", "ü" * 1000, "ü" * 1000]
    told = [usage(server, path, stream, model="abc", cache_salt=salt, **prompt_of(path, text)) for salt in salts]
    assert [one["prompt_tokens_details"]["cached_tokens"] // PAGE for one in told] == [0, 0, 3, 0, 3, 0, 3]


def test_the_next_turn_hits_the_prompt_before_it_but_not_the_answer(server):
    """Case A2-04 as a client sees it."""
    first = "a conversation ".ljust(4 * PAGE, ".")
    answer = server.post(prompt=first, max_tokens=40, ignore_eos=True).json()["choices"][0]["text"]
    told = usage(server, PATHS[0], False, model="abc", prompt=first + answer + " and on")
    assert told["prompt_tokens_details"]["cached_tokens"] == 3 * PAGE
    again = usage(server, PATHS[0], False, model="abc", prompt=first + answer + " and on")
    assert again["prompt_tokens_details"]["cached_tokens"] == (again["prompt_tokens"] - 1) // PAGE * PAGE


@pytest.mark.parametrize("field", ["cache_salt", "prompt_cache_key", "user", "x-session-id", "model"])
def test_nobody_else_hits_what_was_generated(server, field):
    """Paired: two requests that differ in one thing alone share the prompt's pages (but for a salt) and no generated ones."""
    base = f"whose {field} ".ljust(4 * PAGE, ".")

    def cached(text, value):
        in_header = "-" in field
        fields = {"model": "endless"} if in_header else {"model": "endless", field: value}
        headers = {field: value} if in_header else None
        answer = server.post(prompt=text, headers=headers, max_tokens=40, ignore_eos=True, **fields).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["choices"][0]["text"]

    mine, other = ("endless", "abc") if field == "model" else ("mine", "other")
    nothing, text = cached(base, mine)
    assert (nothing, len(text)) == (0, 40)
    grown = base + text + " and on"
    assert cached(grown, other)[0] == (0 if field == "cache_salt" else 3 * PAGE)
    # The base itself has made those pages now, for the other; with the same salt I hit them, else I do not.
    assert cached(grown, mine)[0] == (3 * PAGE if field == "cache_salt" else (len(grown) - 1) // PAGE * PAGE)
    assert cached(grown, other)[0] == (len(grown) - 1) // PAGE * PAGE


@pytest.mark.parametrize("field", ["prompt_cache_key", "user", "x-session-id", "X-OpenWebUI-Chat-Id"])
def test_sessions_stay_with_their_prefill_worker(field):
    with serving(num_prefill=2) as server:
        homes = {}
        for turn in range(3):
            for session in "abcd":
                before = [prefill.num_tokens for prefill in server.fakes.prefill]
                # Prompts that share nothing: only the session's name can bring them together.
                text = f"{turn}{session}".ljust(40, "x")
                in_header = "-" in field
                headers = {field: session} if in_header else None
                fields = {} if in_header else {field: session}
                assert server.post(prompt=text, headers=headers, **fields).status_code == 200
                server.rest()
                grown = [prefill.num_tokens > old for prefill, old in zip(server.fakes.prefill, before, strict=True)]
                homes.setdefault(session, set()).add(grown.index(True))
        assert all(len(home) == 1 for home in homes.values())
        assert len(set.union(*homes.values())) == 2
