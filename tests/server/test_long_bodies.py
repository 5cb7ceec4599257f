"""Oversized bodies of every kind are refused or answered while /health and another client's stream go on (case N2-07)."""

import gc
import json
import threading
import time
from contextlib import contextmanager

import pytest
from fake_server import PATHS, error_of, serving
from tiny_tokenizer import write_tokenizer

from benchmarks.oversized import UNITS
from pshare_jax.engine.kv import keys
from pshare_jax.engine.request import Event, TokenLogprobs
from pshare_jax.server import completions
from pshare_jax.server.openai.json_bytes import PART, dump
from pshare_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.host
MAX_GAP = 1.0
MAX_LEN = 40_000
SIZE = 4_000_000
TEXT, CHAT = PATHS


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "smollm", vocab_size=260)
    with serving(max_len=MAX_LEN, max_body_bytes=10_000_000, tokenizer=Tokenizer.from_folder(folder)) as running:
        running.client.timeout = 60
        running.post(prompt="warm", max_tokens=1)
        yield running


@contextmanager
def watched(server):
    """Fails if /health, polled every 20 ms, or a stream of a token every 20 ms is silent for longer than MAX_GAP.

    Gaps are in seconds of this process's CPU time, so that other processes of the machine do not lengthen them.
    """
    worst, stop = {}, threading.Event()

    def watch(name, arrivals):
        last = time.process_time()
        worst[name] = 0.0
        for _ in arrivals:
            now = time.process_time()
            worst[name], last = max(worst[name], now - last), now
            if stop.is_set():
                return

    def polls():
        while True:
            assert server.client.get("/health").status_code == 200
            yield
            time.sleep(0.02)

    def tokens():
        body = {"model": "endless", "prompt": "p", "stream": True, "max_tokens": MAX_LEN - 100}
        with server.client.stream("POST", TEXT, json=body) as response:
            yield from response.iter_lines()

    server.fakes.decode["endless"].before = lambda: time.sleep(0.02)
    threads = [threading.Thread(target=watch, args=(name, make())) for name, make in (("h", polls), ("s", tokens))]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    try:
        yield
    finally:
        time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join()
        server.rest()
    assert max(worst.values()) < MAX_GAP, worst


def post(server, path, body):
    raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    return server.client.post(path, content=raw, headers={"content-type": "application/json"})


@pytest.mark.parametrize("name", UNITS)
def test_a_text_that_cannot_fit_is_refused_unread(server, name):
    text = UNITS[name] * (SIZE // len(UNITS[name].encode()))
    bodies: dict[str, dict] = {TEXT: {"model": "abc", "prompt": text}}
    bodies[CHAT] = {"model": "abc", "messages": [{"role": "user", "content": text}], "stream": True}
    with watched(server):
        for path, body in bodies.items():
            error = error_of(post(server, path, body), 400)
            assert (error["code"], error["param"]) == ("context_length_exceeded", [*body][1])
            assert f"maximum context length is {MAX_LEN} tokens" in error["message"]
            least = int(error["message"].split("at least ")[1].split()[0])
            assert MAX_LEN <= least <= SIZE


@pytest.mark.parametrize("name", ["words", "digits", "control tokens"])
def test_tokenize_and_detokenize_take_long_texts(server, name):
    text = UNITS[name] * (SIZE // 2 // len(UNITS[name].encode()))
    with watched(server):
        answer = post(server, "/tokenize", {"prompt": text}).json()
        assert answer["count"] == len(answer["tokens"]) > 100_000
        assert post(server, "/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_many_messages_token_ids_and_brackets(server):
    messages = [{"role": ("user", "assistant")[index % 2], "content": "hi"} for index in range(60_001)]
    with watched(server):
        refused = error_of(post(server, CHAT, {"model": "abc", "messages": messages}), 400)
        assert "tokens" in refused["message"]
        refused = error_of(post(server, TEXT, {"model": "abc", "prompt": [5] * 1_000_000}), 400)
        assert "1000000 tokens" in refused["message"]
        assert "nested" in error_of(post(server, TEXT, b"[" * 50_000), 400)["message"]
        brackets = b'{"model": "abc", "prompt": "p", "max_tokens": 1, "x": [' + b"[[[[]]]]," * 900_000 + b"1]}"
        assert "objects and lists" in error_of(post(server, TEXT, brackets), 400)["message"]
        few = brackets.replace(b"[[[[]]]]," * 700_000, b"")
        assert post(server, TEXT, few).status_code == 200
        assert gc.isenabled()
        quoted = {"model": "abc", "prompt": "p", "max_tokens": 1, "x": "[" * 2_000_000 + '"'}
        assert post(server, TEXT, quoted).status_code == 200


def test_a_long_prompt_is_hashed_beside_the_event_loop_and_only_where_it_is_new(server, monkeypatch):
    threads: dict[str, list[int]] = {"hashes": [], "loop": []}

    def watch(module, name, kind):
        call = getattr(module, name)

        def watched(*args):
            return threads[kind].append(threading.get_ident()) or call(*args)

        monkeypatch.setattr(module, name, watched)

    watch(keys, "_digest", "hashes")
    watch(completions, "check_model", "loop")
    prompt, num_known = [index % 250 for index in range(20_000)], 0
    for more in (1, 400, 400):
        prompt += [7] * more
        threads["hashes"].clear()
        body = {"model": "abc", "prompt": prompt, "max_tokens": 1, "user": "an agent"}
        assert post(server, TEXT, body).status_code == 200
        num_pages = (len(prompt) - 1) // server.engine.page_size
        assert len(threads["hashes"]) == num_pages - num_known
        num_known = num_pages
        assert threads["loop"]
        assert not {*threads["loop"]} & {*threads["hashes"]}


def test_grammars_that_take_long_keep_no_long_body_waiting(server, monkeypatch):
    done, make = threading.Event(), completions.answer_grammar
    monkeypatch.setattr(completions, "answer_grammar", lambda *args: done.wait(60) and make(*args))
    body = {"model": "abc", "prompt": "p", "max_tokens": 1, "guided_choice": ["A", "B"]}
    answers = []
    # More than the event loop has threads.
    clients = [threading.Thread(target=lambda: answers.append(post(server, TEXT, body))) for _ in range(40)]
    for client in clients:
        client.start()
    time.sleep(0.2)
    try:
        assert post(server, TEXT, {"model": "abc", "prompt": [65] * 20_000, "max_tokens": 1}).status_code == 200
        assert not answers
    finally:
        done.set()
        for client in clients:
            client.join()
    assert {answer.status_code for answer in answers} == {200}
    server.rest()


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_answer_of_logprobs(server, monkeypatch, stream):
    """A fifth of the prompt logprobs that a call may request, as the engine would report them."""
    submit = server.engine.submit_all
    entry = TokenLogprobs(65, -1.0, tuple((100 + index, -1.5) for index in range(20)))
    num = 200_000 // 21

    def submit_all(requests, takers):
        if not requests[0].scores_prompt:
            return submit(requests, takers)
        takers[0](Event("", 0, "length", prompt_logprobs=(None, *[entry] * (num - 1))))
        return []

    monkeypatch.setattr(server.engine, "submit_all", submit_all)
    limits = server.served.limits
    object.__setattr__(limits, "max_len", num + 100)
    body = {"model": "abc", "prompt": [65] * num, "max_tokens": 0, "echo": True, "logprobs": 20, "stream": stream}
    with watched(server):
        answer = post(server, TEXT, body)
    object.__setattr__(limits, "max_len", MAX_LEN)
    assert answer.status_code == 200
    first = answer.text.split("\n\n")[0].removeprefix("data: ") if stream else answer.text
    logprobs = json.loads(first)["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {num}


@pytest.mark.parametrize("length", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1])
def test_json_in_parts_is_the_json_in_one(length):
    data = {
        "a": [{"b": [*range(length)], "ü": "é\n", "c": [[]] * length}] * 2,
        "d": {},
        "e": None,
        "f": [None] * length,
    }
    whole = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    assert dump(data).decode() == whole
    assert dump(data["a"] * (length // 2)) == dump(data["a"] * (length // 2))
    many = [{"x": index} for index in range(length)]
    assert json.loads(dump({"many": many})) == {"many": many}
