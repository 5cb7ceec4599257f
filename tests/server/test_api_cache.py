"""The prefix cache from outside: cached_tokens on both endpoints, salts, sessions."""

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
    """`text` as the endpoint's prompt, one token per byte: the fake template adds nothing."""
    return {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}


def usage(server, path, stream, **body):
    """The reported usage, checked to be the same in each chunk that has it."""
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
    """Case A2-19: none at first, then full pages, for every task; never the whole prompt."""
    text = f"{extra} {stream} {path} ".ljust(NUM_PAGES * PAGE + extra, "x")
    usages = [usage(server, path, stream, model=task, **prompt_of(path, text)) for task in TASKS]
    assert [entry["prompt_tokens"] for entry in usages] == [len(text)] * 3
    full = (len(text) - 1) // PAGE * PAGE
    assert [entry["prompt_tokens_details"] for entry in usages] == [
        {"cached_tokens": cached} for cached in (0, full, full)
    ]
    assert all(entry["total_tokens"] == entry["prompt_tokens"] + entry["completion_tokens"] for entry in usages)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_salts_separate_tenants(server, path, stream):
    """Case A2-09: the same salt hits and another one misses."""
    text = f"{stream} {path} salted ".ljust(3 * PAGE + 1, "x")
    salts = ["one", "two", "one", None, "", "ü" * 1000, "ü" * 1000]
    usages = [usage(server, path, stream, model="abc", cache_salt=salt, **prompt_of(path, text)) for salt in salts]
    assert [entry["prompt_tokens_details"]["cached_tokens"] // PAGE for entry in usages] == [0, 0, 3, 0, 3, 0, 3]


def test_the_next_turn_reuses_the_previous_prompt_but_not_the_completion(server):
    """Case A2-04 from outside."""
    first = "a conversation ".ljust(4 * PAGE, ".")
    answer = server.post(prompt=first, max_tokens=40, ignore_eos=True).json()["choices"][0]["text"]
    second = usage(server, PATHS[0], False, model="abc", prompt=first + answer + " and on")
    assert second["prompt_tokens_details"]["cached_tokens"] == 3 * PAGE
    again = usage(server, PATHS[0], False, model="abc", prompt=first + answer + " and on")
    assert again["prompt_tokens_details"]["cached_tokens"] == (again["prompt_tokens"] - 1) // PAGE * PAGE


@pytest.mark.parametrize("field", ["cache_salt", "prompt_cache_key", "user", "x-session-id", "model"])
def test_generated_tokens_are_never_reused_by_others(server, field):
    """Two requests that differ in one field share the prompt's pages (except for a salt) but no generated pages."""
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
    # The base has now computed those pages for the other request; with another salt they are not reused.
    assert cached(grown, mine)[0] == (3 * PAGE if field == "cache_salt" else (len(grown) - 1) // PAGE * PAGE)
    assert cached(grown, other)[0] == (len(grown) - 1) // PAGE * PAGE


@pytest.mark.parametrize("field", ["prompt_cache_key", "user", "x-session-id", "X-OpenWebUI-Chat-Id"])
def test_sessions_stay_with_their_prefill_worker(field):
    with serving(num_prefill=2) as server:
        homes = {}
        for turn in range(3):
            for session in "abcd":
                before = [prefill.num_tokens for prefill in server.fakes.prefill]
                # The prompts share no prefix: only the session's name can route them to one worker.
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
