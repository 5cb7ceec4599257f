"""The real server in a process of its own (serve/main.py, default CPU placement) against the oracle `generate`."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jax
import numpy as np
import openai
import pytest
from server_process import CHAT, TEXT, serving
from tiny import tiny_folder, tiny_module

import pshare_jax as ps

FULL, LORA = "org/math-v1.5", "qwen3:lora"
TASKS = ("chat", FULL, LORA)
MAX_LEN = 512
# 33 to 50 tokens: their shapes are those of the warm-up, so that few programs are compiled.
PROMPTS = ["hello there, 0123456789 and 0123456789", "the user and the system is " * 4, "x" * 40]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base = tiny_folder("llama", root / "base")
    modules = {
        "chat": "base",
        FULL: tiny_module(base, root / "full"),
        LORA: tiny_module(base, root / "lora", kind="lora"),
    }
    with serving(base, modules, root) as server:
        yield server


def test_the_config_is_printed_and_the_cpu_is_split(served):
    output = served.output.read_text()
    assert "base: overridden" not in output
    assert "tasks:\n  chat: base\n" in output
    assert "kv:\n  page_size: 16\n" in output
    assert "2 cpu devices; prefill on [0], decode on [1]" in output
    assert re.search(
        r"KV pages \(16 tokens, [\d,]+ bytes\): [\d,]+ in the prefill pool 0, [\d,]+ in the decode pool 0;", output
    )
    assert re.search(r"compiling \d+ of \d+ programs\n", output)
    assert served.client.get("/health").status_code == 200
    assert [card["id"] for card in served.client.get("/v1/models").json()["data"]] == list(TASKS)
    assert served.client.get("/v1/models/org%2Fmath-v1.5").json()["max_model_len"] == MAX_LEN


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stream", [False, True])
def test_text_prompts_equal_the_oracle(served, task, stream):
    for prompt in PROMPTS:
        ids = served.shared.model.tokenizer.encode(prompt)
        answer = served.ask(TEXT, model=task, prompt=prompt, max_tokens=12, stream=stream)
        assert answer == served.expected(task, ids, 12)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stream", [False, True])
def test_chats_equal_the_oracle(served, task, stream):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello, who are you today?"}]
    ids = served.shared.model.tokenizer.encode_chat(messages)
    answer = served.ask(CHAT, model=task, messages=messages, max_tokens=12, stream=stream)
    assert answer == served.expected(task, ids, 12)


@pytest.mark.parametrize("stream", [False, True])
def test_responses_equal_chats(served, stream):
    """The same messages and limits by /v1/responses: the chat's text, end and usage; and so for the next turn."""
    turn: Any = [{"role": "user", "content": "hello, who are you today?"}]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        for task, count in ((FULL, 12), (LORA, 9)):
            made: Any = client.responses.create(
                model=task, instructions="be", input=turn, max_output_tokens=count, temperature=0, stream=stream
            )
            response = [*made][-1].response if stream else made
            messages = [{"role": "system", "content": "be"}, *plain_messages(turn)]
            (text, reason, tokens), usage = served.answer(CHAT, model=task, messages=messages, max_tokens=count)
            assert (response.output_text, response.usage.output_tokens) == (text, tokens)
            assert response.status == ("completed" if reason == "stop" else "incomplete")
            assert response.usage.input_tokens == usage["prompt_tokens"]
            turn = [*turn, *(item.to_dict() for item in response.output), {"role": "user", "content": "and then?"}]


def plain_messages(items):
    """Messages of a chat for items of messages."""
    parts = [item["content"] for item in items]
    texts = [part if isinstance(part, str) else part[0]["text"] for part in parts]
    return [{"role": item["role"], "content": text} for item, text in zip(items, texts, strict=True)]


def test_chat_rendered_text_and_ids_are_one_door(served):
    """Case A1-01: the same prompt as a chat, as the template's text and as token ids; also a system message alone."""
    tokenizer = served.shared.model.tokenizer
    for messages in (
        [{"role": "system", "content": "be"}, {"role": "user", "content": "hello, who are you today?"}],
        [{"role": "system", "content": "be what you were told to be"}],
    ):
        ids = served.client.post("/tokenize", json={"messages": messages}).json()["tokens"]
        assert ids == tokenizer.encode_chat(messages)
        text = served.client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        answers = [
            served.answer(CHAT, model=FULL, messages=messages, max_tokens=8),
            served.answer(TEXT, model=FULL, prompt=text, max_tokens=8),
            served.answer(TEXT, model=FULL, prompt=ids, max_tokens=8),
        ]
        assert [answer for answer, _ in answers] == [served.expected(FULL, ids, 8)] * 3
        assert {usage["prompt_tokens"] for _, usage in answers} == {len(ids)}


def test_token_ids_and_short_answers_equal_the_oracle(served):
    for task, ids in ((FULL, [5]), (FULL, [5, 6]), *((task, list(range(3, 43))) for task in TASKS)):
        for count in (1, 2):
            answer = served.ask(TEXT, model=task, prompt=ids, max_tokens=count)
            assert answer == served.expected(task, ids, count)


def test_an_answer_that_outgrows_its_kv_equals_the_oracle(served):
    ids = list(range(40, 100))
    assert served.ask(TEXT, model=FULL, prompt=ids, max_tokens=12) == served.expected(FULL, ids, 12)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_prefilled_once_for_all_tasks(served, stream):
    """Cases A2-04, A2-19: what is cached is told, and neither hits nor another task's answer change an answer."""
    ids = [7 + stream, *(number * number % 300 for number in range(101))]
    cached = []
    for task in (FULL, "chat", LORA, FULL):
        body = {"model": task, "prompt": ids, "max_tokens": 12, "temperature": 0, "stream": stream}
        answer, usage = served.answer(TEXT, **body)
        assert answer == served.expected(task, ids, 12)
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert usage["prompt_tokens"] == len(ids)
    assert cached == [0, 96, 96, 96]


def test_the_next_turn_of_another_task_equals_the_oracle(served):
    ids = list(range(100, 160))
    turn = [*ids, *served.generate(FULL, ids, 40), 5, 6]
    served.ask(TEXT, model=FULL, prompt=ids, max_tokens=40)
    answer, usage = served.answer(TEXT, model=LORA, prompt=turn, max_tokens=10)
    assert answer == served.expected(LORA, turn, 10)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 48}


def test_tasks_differ_from_the_first_token_on(served):
    firsts = {
        task: [served.ask(TEXT, model=task, prompt=[n] * 40, max_tokens=1)[0] for n in range(8)] for task in TASKS
    }
    assert len({tuple(texts) for texts in firsts.values()}) == len(TASKS)


def test_sampling_with_a_seed_equals_the_oracle(served):
    sampling = ps.SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, seed=7)
    fields = {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7}
    answer = served.ask(TEXT, model=FULL, prompt=[3, 1, 4], max_tokens=10, **fields)
    assert answer == served.expected(FULL, [3, 1, 4], 10, sampling)
    other = served.ask(TEXT, model=FULL, prompt=[3, 1, 4], max_tokens=10, **{**fields, "seed": 8})
    assert other != answer


def test_without_a_seed_the_server_draws_one(served):
    answers = {served.ask(TEXT, prompt=[3, 1, 4], max_tokens=10, temperature=1.0)[0] for _ in range(3)}
    assert len(answers) > 1


def test_every_choice_is_the_oracles_with_its_log_probabilities(served):
    tokenizer = served.shared.model.tokenizer
    prompts = ["hello there, 0123456789", "x" * 40]
    for n, temperature in ((1, 0.0), (3, 1.0)):
        body = {"prompt": prompts, "n": n, "temperature": temperature, "seed": 4, "max_tokens": 6, "logprobs": 2}
        answer = served.client.post(TEXT, json={"model": LORA, **body}).json()
        for index, choice in enumerate(answer["choices"]):
            ids = tokenizer.encode(prompts[index // n])
            sampling = ps.SamplingParams(temperature=temperature, seed=4, choice=index % n)
            text, reason, count = served.expected(LORA, ids, 6, sampling)
            assert (choice["index"], choice["text"], choice["finish_reason"]) == (index, text, reason)
            made = ps.generate(served.shared, LORA, ids, max_new_tokens=6, sampling=sampling)
            lists = choice["logprobs"]
            assert len(lists["tokens"]) == count
            for place, logprob in enumerate(lists["token_logprobs"]):
                context = [*ids, *made[:place]]
                # The module consumes what follows the base's context, all at once, and its last logits are these.
                kv = served.shared.prefill(np.array([context[: len(ids) - 1]]))
                logits, _ = served.shared.decode(LORA, np.array([context[len(ids) - 1 :]]), kv)
                exact = jax.nn.log_softmax(logits[0, -1])
                assert abs(float(exact[made[place]]) - logprob) < 1e-4
                assert max(lists["top_logprobs"][place].values()) == pytest.approx(float(exact.max()), abs=1e-4)


@pytest.mark.parametrize("start", [None, [9, 4]])
def test_scores_of_prompts_are_the_oracles(served, start):
    """Invariant 4, both readings: every token as the first of an answer, and a begun answer as training computes it."""
    prompts = [list(range(3, 43)), [7, 1, 7, 2, 7, 3]]
    body = {"model": LORA, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    if start:
        body["response_start"] = start
    # The scoring step is compiled in the background after the start.
    answer = served.client.post(TEXT, json=body, timeout=240).json()
    for index, (choice, ids) in enumerate(zip(answer["choices"], prompts, strict=True)):
        first = start[index] if start else None
        expected = ps.score(served.shared, LORA, ids, response_start=first)
        told = choice["logprobs"]["token_logprobs"][: len(ids)]
        assert [one is None for one in told] == [one is None for one in expected]
        assert told == pytest.approx(expected, abs=1e-4)
        made = ps.generate(served.shared, LORA, ids, max_new_tokens=1, response_start=first)
        shown = [] if made[0] in served.shared.model.stop_ids else made
        assert choice["text"] == served.shared.model.tokenizer.decode([*ids, *shown], skip_special_tokens=False)


def test_a_concurrent_mix_equals_the_oracle(served):
    def one(number):
        task, ids = TASKS[number % 3], [number + 1] * (40 + number % 5) + [7, 8]
        stream = bool(number % 2)
        return served.ask(TEXT, model=task, prompt=ids, max_tokens=10, stream=stream), (task, ids)

    with ThreadPoolExecutor(8) as pool:
        for answer, (task, ids) in pool.map(one, range(18)):
            assert answer == served.expected(task, ids, 10)


BAD = [
    (TEXT, {"max_tokens": "5"}, 400, "max_tokens"),
    (TEXT, {"prompt": [5, 320]}, 400, "prompt"),
    (TEXT, {"prompt": []}, 400, "prompt"),
    (TEXT, {"prompt": ["a", [1]]}, 400, "prompt"),
    (TEXT, {"n": 0}, 400, "n"),
    (TEXT, {"n": 100, "prompt": ["a"] * 3}, 400, "n"),
    (TEXT, {"logit_bias": {"320": 1}}, 400, "logit_bias"),
    (TEXT, {"model": "typo"}, 404, "model"),
    (TEXT, {"model": "org"}, 404, "model"),
    (TEXT, {"prompt": [1] * 500, "max_tokens": 13, "stream": True}, 400, "prompt"),
    (TEXT, {"prompt": "many words " * 500, "stream": True}, 400, "prompt"),
    (CHAT, {"messages": []}, 400, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 600}], "stream": True}, 400, "messages"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, 400, "messages"),
]


@pytest.mark.parametrize(("path", "fields", "status", "param"), BAD)
def test_bad_requests_are_one_sentence_and_leave_the_server_alive(served, path, fields, status, param):
    valid = {"prompt": [1, 2]} if path == TEXT else {"messages": [{"role": "user", "content": "x"}]}
    response = served.client.post(path, json={"model": "chat", **valid, **fields})
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    error = response.json()["error"]
    assert error["param"] == param
    assert "\n" not in error["message"]
    assert served.client.get("/health").status_code == 200


def test_too_long_tells_the_true_numbers(served):
    error = served.client.post(TEXT, json={"model": "chat", "prompt": [1] * 500, "max_tokens": 20}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 512 tokens" in error["message"]
    assert "requested 520 tokens (500 in the prompt, 20 in the completion)" in error["message"]


def test_hanging_up_leaves_the_server_answering(served):
    body = {"model": FULL, "prompt": [1] * 40, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    for _ in range(3):
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{served.url}{TEXT}", json=body, timeout=0.05)
        with httpx.stream("POST", f"{served.url}{TEXT}", json={**body, "stream": True}, timeout=60) as response:
            next(response.iter_lines())
    assert served.ask(TEXT, model=FULL, prompt=[4, 5], max_tokens=5) == served.expected(FULL, [4, 5], 5)


def test_the_openai_client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == list(TASKS)
        assert client.models.retrieve(FULL).id == FULL
        chat = {"model": FULL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
        whole = client.chat.completions.create(**chat)
        with client.chat.completions.create(**chat, stream=True) as stream:
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == whole.choices[0].message.content
        assert whole.usage.completion_tokens == 8
        text = client.completions.create(model=LORA, prompt="hi", max_tokens=4, temperature=0, extra_body={"top_k": 5})
        assert text.choices[0].finish_reason == "length"
        with pytest.raises(openai.NotFoundError, match="typo"):
            client.chat.completions.create(**{**chat, "model": "typo"})
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
            client.chat.completions.create(**{**chat, "max_tokens": 10**9})
