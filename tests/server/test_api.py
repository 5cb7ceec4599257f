"""app.py over real sockets: responses, streams, models, errors."""

import random

import pytest
from fake_server import FAMILY, MAX_LEN, PATHS, SCRIPTS, error_of, pieces, serving

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_stop_ids_end_the_text_and_are_not_shown(server, path):
    assert server.ask(path) == ("ABCDEFGH", "stop", 9)
    assert server.ask(path, model="org/math-v1.5") == ("math", "stop", 5)
    assert server.ask(path, ignore_eos=True, max_tokens=11) == ("ABCDEFGHAB", "length", 11)
    assert server.ask(path, stop_token_ids=[67]) == ("AB", "stop", 3)


@pytest.mark.parametrize("path", PATHS)
def test_stop_strings(server, path):
    assert server.ask(path, stop="CDEFG") == ("AB", "stop", 7)
    assert server.ask(path, stop=["CDEX", None]) == ("ABCDEFGH", "stop", 9)
    assert server.ask(path, stop=["CDEX"], max_tokens=5) == ("ABCDE", "length", 5)
    assert server.ask(path, stop=["A"]) == ("", "stop", 1)


@pytest.mark.parametrize("path", PATHS)
def test_stop_strings_end_an_answer_only_after_min_tokens(server, path):
    """The stop string must end in a later token; it may begin in an earlier one (as in vLLM)."""
    assert server.ask(path, stop="B", min_tokens=1) == ("A", "stop", 2)
    assert server.ask(path, stop="B", min_tokens=2, max_tokens=9, ignore_eos=True) == ("ABCDEFGH", "length", 9)
    assert server.ask(path, stop=["A", "C", "CD"], min_tokens=3) == ("AB", "stop", 4)
    assert server.ask(path, stop=["A", "B"], min_tokens=4) == ("ABCDEFGH", "stop", 9)
    assert server.ask(path, stop="C", min_tokens=3, max_tokens=3) == ("ABC", "length", 3)
    assert server.ask(path, stop="é", min_tokens=3, model="qwen3:mit Leer ü", max_tokens=200)[1] == "stop"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [5, 16, 64])
def test_many_stop_strings(server, path, count):
    """Case N1-08: agents send more than four."""
    assert server.ask(path, stop=[*(f"\nStep {index}:" for index in range(count - 1)), "DE"]) == ("ABC", "stop", 5)


def test_a_completion_has_16_tokens_by_default_and_a_chat_fills_the_context(server):
    with serving(max_len=400) as small:
        for path, count in zip(PATHS, (16, 399), strict=True):
            assert small.ask(path, model="endless")[1:] == ("length", count)
        assert small.post(prompt="p" * 390, model="endless").json()["usage"]["completion_tokens"] == 10
        assert small.post(model="endless", min_tokens=20).json()["usage"]["completion_tokens"] == 20
        assert small.post(model="endless", max_tokens=17).json()["usage"]["completion_tokens"] == 17
        echo = small.post(model="endless", echo=True).json()["choices"][0]["text"]
        assert echo == "p" + "x" * 16


def test_an_unmatched_stop_string_delays_no_text(server):
    chunks = server.stream("/v1/completions", model="abc", prompt="p", stop="Z" * 40)
    assert pieces(chunks) == [*"ABCDEFGH", ""]


@pytest.mark.parametrize("path", PATHS)
def test_characters_are_whole_and_streams_equal_full_responses(server, path):
    text, _, _ = server.ask(path, model="qwen3:mit Leer ü", max_tokens=200)
    assert text == FAMILY
    size = len(FAMILY.encode())
    for cut in [*range(1, 14), size - 1, size]:
        text, why, count = server.ask(path, model="qwen3:mit Leer ü", max_tokens=cut)
        assert (text, why, count) == (FAMILY.encode()[:cut].decode(errors="replace"), "length", cut)
    server.ask(path, model="broken", max_tokens=6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 2])
def test_exactly_max_tokens(server, path, count):
    for name in SCRIPTS:
        assert server.ask(path, model=name, max_tokens=count, ignore_eos=True)[1:] == ("length", count)


def test_max_completion_tokens_equals_max_tokens(server):
    assert server.ask(PATHS[1], max_completion_tokens=2) == ("AB", "length", 2)


@pytest.mark.parametrize("prompt", ["hey", [104, 101, 121], ["hey"], [[104, 101, 121]]])
def test_prompt_forms(server, prompt):
    assert server.post(prompt=prompt).json()["usage"]["prompt_tokens"] == 3


def test_tools_reach_the_template_whatever_tool_choice_is(server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    ask = {"model": "abc", "messages": [{"role": "user", "content": "p"}], "tools": tools}
    counts = [
        server.client.post(PATHS[1], json={**ask, "tool_choice": choice}).json()["usage"]["prompt_tokens"]
        for choice in ("auto", "none")
    ]
    assert counts == [9, 9]


def test_full_responses(server):
    chat = server.client.post(PATHS[1], json={"model": "abc", "messages": [{"role": "user", "content": "p"}]}).json()
    assert chat["object"] == "chat.completion"
    assert chat["choices"] == [
        {"index": 0, "logprobs": None, "finish_reason": "stop", "message": {"role": "assistant", "content": "ABCDEFGH"}}
    ]
    usage = {
        "prompt_tokens": 1,
        "completion_tokens": 9,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert chat["usage"] == usage
    text = server.post().json()
    assert (text["object"], text["model"], text["usage"]) == ("text_completion", "abc", usage)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
def test_usage_in_streams_only_if_requested(server, path, usage, continuous):
    body = {"model": "abc", "prompt": "p", "messages": [{"role": "user", "content": "p"}]}
    chunks = server.stream(path, **body, stream_options={"include_usage": usage, "continuous_usage_stats": continuous})
    ends = [chunk for chunk in chunks if not chunk["choices"]]
    rest = [chunk for chunk in chunks if chunk["choices"]]
    assert len(ends) == int(usage)
    if not usage:
        assert all("usage" not in chunk for chunk in chunks)
        return
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in rest]
    assert counts == (sorted(counts) if continuous else [None] * len(rest))
    assert not continuous or counts[-1] == 9


def test_chat_streams_start_with_the_role_and_keep_one_id(server):
    chunks = server.stream(PATHS[1], model="abc", messages=[{"role": "user", "content": "p"}])
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert len({(chunk["id"], chunk["object"]) for chunk in chunks}) == 1
    # One chunk per token, then the finish reason.
    assert len(chunks) == 1 + 8 + 1


# --- models, health, ids ---------------------------------------------------------------------------------------------


def test_models_in_order_and_by_escaped_name(server):
    listed = server.client.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == list(SCRIPTS)
    assert listed["data"][0]["max_model_len"] == MAX_LEN
    for name in SCRIPTS:
        for quoted in (name, name.replace("/", "%2F").replace(":", "%3A")):
            assert server.client.get(f"/v1/models/{quoted}").json()["id"] == name


@pytest.mark.parametrize("name", ["typo", "", "ABC", "abc ", "base", "org"])
def test_unknown_models_are_404_and_list_the_known_models(server, name):
    for response in (server.post(model=name), server.client.get(f"/v1/models/{name}")):
        if response.request.url.path == "/v1/models/":
            continue
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert all(task in error["message"] for task in SCRIPTS)


def test_request_ids(server):
    assert server.client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert len(server.client.get("/health").headers["x-request-id"]) == 32
    sent = {"x-request-id": "e-9", "content-type": "application/json"}
    assert server.client.post(PATHS[0], content="{", headers=sent).headers["x-request-id"] == "e-9"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
def test_too_long_prompts_are_refused_before_the_first_byte_of_a_stream(server, path, stream):
    text = "x" * 90_000
    prompt = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    error = error_of(
        server.client.post(path, json={"model": "abc", "stream": stream, "max_tokens": 10_001, **prompt}), 400
    )
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == next(iter(prompt))
    assert all(str(number) in error["message"] for number in (MAX_LEN, 100_001))


def test_a_template_refuses_with_its_own_reason(server):
    body = {"model": "abc", "messages": [{"role": "assistant", "content": "p"}], "stream": True}
    error = error_of(server.client.post(PATHS[1], json=body), 400)
    assert "roles must alternate" in error["message"]
    assert error["param"] == "messages"


# fmt: off
VALUES = [
    None, True, False, 0, 1, -1, 5, 10**30, 0.5, -0.0, "", "x", "5", "\u0000", [], {}, [None], ["x"], [[]], [1, 2],
    [{}], {"type": "text"}, {"include_usage": True}, [{"role": "user", "content": "x"}], {"a": {"b": []}},
]
FIELDS = [
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream", "stream_options", "n", "prompt",
    "messages", "tools", "tool_choice", "model", "stop_token_ids", "user", "response_format", "logit_bias", "echo",
    "logprobs", "response_start", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
]
# fmt: on


@pytest.mark.parametrize("path", PATHS)
def test_no_body_makes_a_500(server, path):
    # Hypothesis cannot share a process with threads that use `random`, as uvicorn does; test_protocol.py uses it.
    draw = random.Random(0)
    for _ in range(150):
        body = {"model": "abc", "prompt": "p", "messages": [{"role": "user", "content": "p"}], "max_tokens": 3}
        body |= {draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randint(1, 3))}
        response = server.client.post(path, json=body)
        assert response.status_code in (200, 400, 404), body
        if response.status_code != 200:
            error_of(response, response.status_code)
