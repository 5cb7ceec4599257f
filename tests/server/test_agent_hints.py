"""The field agent_hint over HTTP: what it does, what is refused, and what the metrics say."""

import pytest
from fake_server import PAGE, PATHS, reason, serving

pytestmark = pytest.mark.host
CHAT = PATHS[1]


@pytest.fixture(scope="module")
def server():
    with serving(num_prefill=2) as running:
        yield running


def prompt_of(path, text):
    return {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}


def metric(server, name, **labels):
    """The sum of a metric's samples with these labels."""
    found = 0.0
    for line in server.client.get("/metrics").text.splitlines():
        sample, _, value = line.rpartition(" ")
        if sample.split("{")[0] == name and all(f'{label}="{one}"' in sample for label, one in labels.items()):
            found += float(value)
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("hint", "key"),
    [
        ({"session": 1}, "session"),
        ({"session": "x" * 257}, "session"),
        ({"session": "s", "parent": ["p"]}, "parent"),
        ({"session": "s", "parent": "x" * 257}, "parent"),
        ({"session": "s", "pin_seconds": "60"}, "pin_seconds"),
        ({"session": "s", "pin_seconds": True}, "pin_seconds"),
        ({"session": "s", "pin_seconds": -1}, "pin_seconds"),
        ({"session": "s", "pin_seconds": 86_401}, "pin_seconds"),
        ({"session": "s", "evict": 1}, "evict"),
        ({"session": "s", "prefetch": "yes"}, "prefetch"),
        ({"pin_seconds": 60}, "pin_seconds"),
        ({"evict": True}, "evict"),
    ],
)
def test_wrong_hints_are_refused_by_name(server, path, hint, key):
    response = server.client.post(path, json={"model": "abc", **prompt_of(path, "p"), "agent_hint": hint})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "agent_hint")
    assert error["message"].startswith(f"agent_hint.{key}")


@pytest.mark.parametrize("hint", [[], "s", 1, True])
def test_a_hint_is_an_object(server, hint):
    response = server.post(agent_hint=hint)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "agent_hint must be an object.")


def test_unknown_keys_are_ignored_and_counted(server):
    before = metric(server, "pshare_unknown_hint_keys_total")
    hint = {"session": None, "priority": 3, "seed": {"a": []}, "evict": None}
    assert server.post(agent_hint=hint).status_code == 200
    assert metric(server, "pshare_unknown_hint_keys_total") == before + 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fields", [{}, {"max_tokens": 0}, {"max_tokens": 9, "min_tokens": 9, "n": 2}])
def test_a_prefetch_answers_nothing_and_the_next_call_hits_its_pages(server, path, fields):
    text = f"{len(str(fields))} {path} ".ljust(10 * PAGE + 3, "x")
    body = {"model": "endless", **prompt_of(path, text), **fields, "agent_hint": {"prefetch": True}}
    steps = sum(worker.num_steps for worker in server.engine.decode_workers)
    prefetched = metric(server, "pshare_prefetched_tokens_total", task="endless")
    whole = server.client.post(path, json=body).json()
    empty = {"message": {"role": "assistant", "content": ""}} if "chat" in path else {"text": ""}
    for index, choice in enumerate(whole["choices"]):
        assert choice == {"index": index, "logprobs": None, "finish_reason": "stop", **empty}
    usage = {"prompt_tokens": len(text), "completion_tokens": 0, "total_tokens": len(text)}
    assert whole["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    server.rest()
    assert metric(server, "pshare_prefetched_tokens_total", task="endless") == prefetched + 10 * PAGE

    chunks = server.stream(path, **body, stream_options={"include_usage": True})
    cached = {"prompt_tokens_details": {"cached_tokens": 10 * PAGE}}
    assert chunks[-1]["usage"] == {**usage, **cached}
    if "n" not in fields:
        assert reason(chunks) == "stop"
        roles = [{"role": "assistant", "content": ""}] if "chat" in path else []
        assert [chunk["choices"][0].get("delta", {}) for chunk in chunks[:-1]] == [*roles, {}]
    assert sum(worker.num_steps for worker in server.engine.decode_workers) == steps

    hits = metric(server, "pshare_prefetched_page_hits_total")
    answer = server.client.post(path, json={"model": "abc", **prompt_of(path, text)}).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 10 * PAGE}
    assert metric(server, "pshare_prefetched_page_hits_total") > hits


def test_a_prefetch_and_scores_exclude_each_other(server):
    response = server.post(echo=True, logprobs=0, agent_hint={"prefetch": True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "agent_hint")


def test_a_header_names_the_session_before_the_hint_and_the_hint_before_other_fields(server):
    seen = []
    server.engine.on_end.append(lambda sequence: seen.append(sequence.request.session))
    for fields, headers in (
        ({"agent_hint": {"session": "hint"}, "user": "user", "prompt_cache_key": "key"}, {"x-session-id": "header"}),
        ({"agent_hint": {"session": "hint"}, "user": "user", "prompt_cache_key": "key"}, None),
        ({"agent_hint": {"session": ""}, "user": "user"}, None),
    ):
        assert server.post(headers=headers, **fields).status_code == 200
    server.rest()
    server.engine.on_end.pop()
    assert seen == ["header", "hint", "user"]


def test_pins_and_evictions_are_counted(server):
    text = "pinned and evicted ".ljust(4 * PAGE + 1, ".")
    hint = {"session": "counted", "pin_seconds": 600}
    assert server.post(prompt=text, agent_hint=hint).status_code == 200
    server.rest()
    # In the prefill pool and the decode pool.
    assert metric(server, "pshare_pinned_pages") == 8
    assert server.post(prompt=text, headers={"x-session-id": "counted"}).status_code == 200
    assert metric(server, "pshare_pinned_page_hits_total") >= 4
    first = metric(server, "pshare_pages_put_first_total")
    assert server.post(agent_hint={"session": "counted", "evict": True, "prefetch": True}).status_code == 200
    server.rest()
    assert metric(server, "pshare_pinned_pages") == 0
    assert metric(server, "pshare_lapsed_pins_total", reason="ended") == 8
    assert metric(server, "pshare_pages_put_first_total") == first + 8


def test_a_child_goes_to_its_parents_prefill_worker():
    for parent, expected in (("p", 0), (None, 1)):
        with serving(num_prefill=2) as server:
            assert server.post(prompt="parent", agent_hint={"session": "p"}).status_code == 200
            hint = {"session": "c", "parent": parent}
            assert server.post(prompt="a child's own prompt".ljust(40), agent_hint=hint).status_code == 200
            server.rest()
            assert [prefill.num_tokens > 10 for prefill in server.fakes.prefill].index(True) == expected


def test_the_schema_lists_the_keys(server):
    schema = server.client.get("/openapi.json").json()["paths"][CHAT]["post"]["requestBody"]["content"]
    keys = schema["application/json"]["schema"]["properties"]["agent_hint"]["properties"]
    assert set(keys) == {"session", "parent", "pin_seconds", "evict", "prefetch"}


def test_the_responses_api_has_the_field_too(server):
    text = "a response ".ljust(5 * PAGE + 1, "r")
    body = {"model": "abc", "input": text}
    prefetch = server.client.post("/v1/responses", json={**body, "agent_hint": {"prefetch": True}}).json()
    assert (prefetch["status"], prefetch["usage"]["output_tokens"]) == ("completed", 0)
    answer = server.client.post("/v1/responses", json={**body, "agent_hint": {"session": "r"}}).json()
    assert answer["usage"]["input_tokens_details"]["cached_tokens"] == 5 * PAGE
    refused = server.client.post("/v1/responses", json={**body, "agent_hint": {"evict": 1}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "agent_hint")
