"""app.py over real sockets: several choices and prompts in one call, logprobs, tokenizer endpoints."""

import pytest
from fake_server import FAMILY, PATHS, error_of, serving
from serving_fakes import EOS

from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host
CHOICES = ["ABCDEFGH", "A", "AB", "ABC"]
EMOJI = "qwen3:mit Leer ü"


@pytest.fixture(scope="module")
def server():
    with serving(max_requests=6) as running:
        yield running


def body_for(path, **fields):
    prompt = {"messages": [{"role": "user", "content": "p"}]} if "chat" in path else {"prompt": "p"}
    return {"model": "abc", **prompt, **fields}


def content(choice):
    if "text" in choice:
        return choice["text"]
    return choice.get("message", choice.get("delta", {})).get("content", "")


@pytest.mark.parametrize("path", PATHS)
def test_every_choice_has_its_text_and_one_finish_reason(server, path):
    whole = server.client.post(path, json=body_for(path, n=4)).json()
    assert [(choice["index"], content(choice), choice["finish_reason"]) for choice in whole["choices"]] == [
        (index, text, "stop") for index, text in enumerate(CHOICES)
    ]
    chunks = server.stream(path, **body_for(path, n=4), stream_options={"include_usage": True})
    for index, text in enumerate(CHOICES):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"] and chunk["choices"][0]["index"] == index]
        assert "".join(map(content, mine)) == text
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
        assert mine[-1]["finish_reason"] == "stop"
        if "chat" in path:
            assert mine[0]["delta"]["role"] == "assistant"
    assert len({chunk["id"] for chunk in chunks}) == 1
    expected = {"prompt_tokens": 1, "completion_tokens": 9 + 2 + 3 + 4, "total_tokens": 19}
    for usage in (whole["usage"], chunks[-1]["usage"]):
        assert {name: usage[name] for name in expected} == expected
    assert chunks[-1]["choices"] == []


def test_prompts_are_in_order_and_count_once(server):
    prompts = ["p" * 40, "q" * 70]
    answer = server.post(prompt=prompts, n=3).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(CHOICES[:3] * 2))
    assert answer["usage"]["prompt_tokens"] == 110
    assert answer["usage"]["completion_tokens"] == 2 * (9 + 2 + 3)
    # Nothing was cached before the call; after it, all full pages are.
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    again = server.post(prompt=[[*prompts[0].encode()], [*prompts[1].encode()]], n=3).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 32 + 64
    chunks = server.stream(PATHS[0], model="abc", prompt=prompts, n=3, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == again["usage"]


def test_a_call_is_accepted_as_a_whole_or_not_at_all(server):
    assert error_of(server.post(prompt=["a", "b"], n=4), 400)["param"] == "n"
    with server.client.stream(
        "POST", PATHS[0], json=body_for(PATHS[0], model="endless", stream=True, max_tokens=50_000)
    ) as running:
        lines = running.iter_lines()
        next(lines)
        aborted = server.engine.num_ended.get(State.ABORTED, 0)
        assert error_of(server.post(n=6), 429)["code"] == "rate_limit_exceeded"
        assert server.engine.num_ended.get(State.ABORTED, 0) == aborted
        server.rest(live=1)
    server.rest()
    assert len(server.post(n=6).json()["choices"]) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_disconnecting_aborts_all_choices(server, stream):
    body = body_for(PATHS[0], model="endless", stream=stream, max_tokens=50_000, prompt=["a", "b", "c"])
    if stream:
        with server.client.stream("POST", PATHS[0], json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(Exception, match="timed out"):
            server.client.post(PATHS[0], json=body, timeout=0.3)
    server.rest()


@pytest.mark.parametrize("stream", [False, True])
def test_one_failure_ends_the_call(stream, caplog):
    with serving() as server:
        server.fakes.decode["abc"].fail_at = 3
        body = body_for(PATHS[0], n=2)
        if stream:
            chunks = server.stream(PATHS[0], **body, stream_options={"include_usage": True})
            assert sum("error" in chunk for chunk in chunks) == 1
            assert "error" in chunks[-1]
        else:
            error_of(server.client.post(PATHS[0], json=body), 500)
        server.rest()


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [None, 0, 1, 5])
def test_chat_logprobs_have_the_tokens_own_bytes(server, top):
    body = body_for(PATHS[1], model=EMOJI, logprobs=True, top_logprobs=top)
    whole = server.client.post(PATHS[1], json=body).json()["choices"][0]["logprobs"]
    chunks = server.stream(PATHS[1], **body)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    entries = [entry for logprobs in streamed if logprobs for entry in logprobs["content"]]
    assert entries == whole["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == FAMILY
    # One entry per token except the end, each with its alternatives, the chosen token first.
    assert len(entries) == len(FAMILY.encode())
    for entry in entries:
        assert len(entry["top_logprobs"]) == (top or 0)
        assert all(token["token"] and token["bytes"] for token in entry["top_logprobs"])
        if top:
            assert entry["top_logprobs"][0] == {name: entry[name] for name in ("token", "logprob", "bytes")}
    assert entries[0]["token"] == "bytes:\\xf0"
    assert not any("\ufffd" in entry["token"] for entry in entries)


@pytest.mark.parametrize("top", [0, 1, 4])
def test_completion_logprobs_have_one_entry_per_token(server, top):
    body = body_for(PATHS[0], model=EMOJI, logprobs=top, max_tokens=200)
    whole = server.client.post(PATHS[0], json=body).json()["choices"][0]
    lists = whole["logprobs"]
    assert whole["text"] == FAMILY
    assert {name: len(one) for name, one in lists.items()} == dict.fromkeys(
        ["tokens", "token_logprobs", "top_logprobs", "text_offset"], len(FAMILY.encode()) + 1
    )
    assert lists["tokens"][-1] == f"<{EOS}>"
    for token, logprob, tops in zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True):
        assert tops[token] == logprob == max(tops.values())
        assert len(tops) == max(top, 1)
    # Each byte of a character has that character's offset.
    offsets = [index for index, character in enumerate(FAMILY) for _ in character.encode()]
    assert lists["text_offset"] == [*offsets, len(FAMILY)]
    parts = [chunk["choices"][0]["logprobs"] for chunk in server.stream(PATHS[0], **body)]
    joined = {name: [value for part in parts if part for value in part[name]] for name in lists}
    assert joined == lists


def test_no_logprobs_unless_requested(server):
    for path in PATHS:
        assert server.client.post(path, json=body_for(path)).json()["choices"][0]["logprobs"] is None
        chunks = server.stream(path, **body_for(path))
        assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)


def test_a_stop_string_leaves_the_entries_of_its_tokens(server):
    choice = server.post(stop="DE", logprobs=0).json()["choices"][0]
    assert (choice["text"], "".join(choice["logprobs"]["tokens"])) == ("ABC", "ABCDE")


# --- prompts in the answer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("prompt", ["wörld", [*b"w", 257, *b"rld"]])
def test_echo_begins_with_the_prompt(server, prompt, logprobs):
    body = {"model": "abc", "prompt": [prompt, prompt], "echo": True, "max_tokens": 3, "logprobs": logprobs, "n": 2}
    answer = server.client.post(PATHS[0], json=body).json()
    shown = prompt if isinstance(prompt, str) else "w<257>rld"
    assert [choice["text"] for choice in answer["choices"]] == [shown + text for text in ("ABC", "A") * 2]
    ids = [*prompt.encode()] if isinstance(prompt, str) else prompt
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2 * len(ids), 2 * (3 + 2))
    chunks = server.stream(PATHS[0], **body)
    for index, choice in enumerate(answer["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["text"] == shown
        assert "".join(map(content, mine)) == choice["text"]
        lists = choice["logprobs"]
        if logprobs is None:
            assert lists is None
            continue
        assert {len(values) for values in lists.values()} == {len(ids) + (3, 2)[index % 2]}
        assert lists["token_logprobs"][0] is lists["top_logprobs"][0] is None
        assert None not in lists["token_logprobs"][1:]
        for place, offset in enumerate(lists["text_offset"]):
            token = lists["tokens"][place]
            assert token.startswith(("bytes:", f"<{EOS}>")) or choice["text"][offset:].startswith(token)
        parts = [choice["logprobs"] for choice in mine if choice["logprobs"]]
        assert {name: [value for part in parts for value in part[name]] for name in lists} == lists


def test_echo_without_generation(server):
    choice = server.post(prompt="hello", echo=True, max_tokens=0, logprobs=1).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], len(choice["logprobs"]["tokens"])) == ("hello", "length", 5)
    choice = server.post(prompt="hello", echo=True, max_tokens=0).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("hello", "length", None)
    for path in PATHS:
        assert error_of(server.client.post(path, json=body_for(path, max_tokens=0)), 400)["param"] == "max_tokens"


@pytest.mark.parametrize("max_tokens", [0, 1, 3, 300])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_every_length_with_and_without_echo(server, max_tokens, echo, logprobs):
    """Case A1-23."""
    body = {"model": "abc", "prompt": "pp", "max_tokens": max_tokens, "echo": echo, "logprobs": logprobs}
    response = server.client.post(PATHS[0], json=body)
    if not max_tokens and not echo:
        assert error_of(response, 400)["param"] == "max_tokens"
        return
    whole = response.json()
    made = {0: "", 1: "A", 3: "ABC", 300: "ABCDEFGH"}[max_tokens]
    choice, count = whole["choices"][0], len(made) + (max_tokens == 300)
    assert choice["text"] == "pp" * echo + made
    assert choice["finish_reason"] == ("stop" if max_tokens == 300 else "length")
    assert whole["usage"]["completion_tokens"] == count
    assert logprobs is None or len(choice["logprobs"]["tokens"]) == 2 * echo + count
    chunks = server.stream(PATHS[0], **body, stream_options={"include_usage": True})
    assert "".join(map(content, (chunk["choices"][0] for chunk in chunks[:-1]))) == choice["text"]
    assert {**chunks[-1]["usage"], "prompt_tokens_details": 0} == {**whole["usage"], "prompt_tokens_details": 0}


def test_prompt_logprobs_are_limited(server):
    body = {"prompt": "x" * 60_000, "echo": True, "logprobs": 20, "max_tokens": 1}
    assert error_of(server.post(**body), 400)["param"] == "logprobs"
    assert error_of(server.post(**{**body, "logprobs": 4, "n": 6}), 400)["param"] == "logprobs"


def test_response_start_scores_the_response_tokens(server):
    body = {"prompt": ["pABC", "ppppA"], "response_start": [1, 4], "echo": True, "logprobs": 0, "max_tokens": 1}
    first, second = server.post(**body).json()["choices"]
    # The script's next token has logprob 0, others -1.
    assert first["logprobs"]["token_logprobs"][:4] == [None, 0.0, 0.0, 0.0]
    assert second["logprobs"]["token_logprobs"][:5] == [None, None, None, None, 0.0]
    assert (first["text"], second["text"]) == ("pABCD", "ppppAB")
    # Without echo the completion continues the response.
    assert server.post(prompt="pABC", response_start=1, max_tokens=3).json()["choices"][0]["text"] == "DEF"


@pytest.mark.parametrize(
    ("prompt", "start"), [("abc", 0), ("abc", 3), ("abc", -1), ("a", 1), (["abc", "de"], [1]), (["abc", "de"], [1, 2])]
)
def test_a_response_start_outside_the_prompt_is_refused(server, prompt, start):
    assert error_of(server.post(prompt=prompt, response_start=start), 400)["param"] == "response_start"


# --- tokens and cache ------------------------------------------------------------------------------------------------


def test_tokenize_and_back(server):
    answer = server.client.post("/tokenize", json={"model": "abc", "prompt": "hé", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": server.engine.facts.max_len,
        "tokens": [*"hé".encode()],
        "token_strs": ["h", "bytes:\\xc3", "bytes:\\xa9"],
    }
    assert server.client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hé"}
    assert server.client.post("/detokenize", json={"tokens": [104, EOS]}).json() == {"prompt": f"h<{EOS}>"}
    chat = server.client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert (chat["tokens"], chat["token_strs"]) == ([*b"hi"], None)
    info = server.client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["chat_template"]) == ("<eos>", None, "a template")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**12]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
    ],
)
def test_tokenizer_bodies_are_refused_by_field(server, path, body, param):
    assert error_of(server.client.post(path, json=body), 400)["param"] == param


def test_flush_cache_drops_all_cached_pages(server):
    prompt = "r" * 64
    cached = [server.post(prompt=prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    server.rest()
    assert server.client.post("/flush_cache").json()["flushed_pages"] >= 4
    assert server.client.post("/flush_cache").json() == {"flushed_pages": 0}
    cached.append(server.post(prompt=prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 48, 0]
