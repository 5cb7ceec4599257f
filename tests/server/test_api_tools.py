"""Function calls over real sockets: answers of every format whole and as a stream, read by the openai client and by hand."""

import json

import openai
import pytest
from fake_server import PATHS, error_of, serving
from serving_fakes import EOS, ByteTokenizer

from pshare_jax.text.tool_format import FORMATS

pytestmark = pytest.mark.host
CHAT = PATHS[1]
USER = {"role": "user", "content": "p"}


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


TOOLS = [tool("get_weather"), tool("get.time")]
OSLO = '{"city": "\\"}{", "near": ["é👩"]}'
WEATHER, TIME = f'{{"name": "get_weather", "arguments": {OSLO}}}', '{"name": "get.time"}'
CALLS = [("get_weather", OSLO), ("get.time", "{}")]
HERMES = f"<tool_call>\n{WEATHER}\n</tool_call>"
ANSWERS = {
    # task: format, answer, content, calls, finish reason
    "text": ("hermes", "No <tool> is {needed}.\n", "No <tool> is {needed}.\n", [], "stop"),
    "one": ("hermes", HERMES, None, CALLS[:1], "tool_calls"),
    "two": ("hermes", f"{HERMES}\n<tool_call>{TIME}</tool_call>", None, CALLS, "tool_calls"),
    "around": ("hermes", f"I look.\n{HERMES} Done.", "I look.\nDone.", CALLS[:1], "tool_calls"),
    "open": ("hermes", f"<tool_call>\n{WEATHER}", None, CALLS[:1], "tool_calls"),
    "no call": ("hermes", "<tool_call>\nno</tool_call>", "<tool_call>\nno</tool_call>", [], "stop"),
    "unknown": ("hermes", '<tool_call>{"name": "x"}</tool_call>', None, [("x", "{}")], "tool_calls"),
    "object": ("llama3", WEATHER, None, CALLS[:1], "tool_calls"),
    "objects": ("llama3", f"{WEATHER}; {TIME}", None, CALLS, "tool_calls"),
    "json": ("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', [], "stop"),
    "list": ("json_list", f"[{WEATHER}, {TIME}]", None, CALLS, "tool_calls"),
    "empty": ("json_list", "", "", [], "stop"),
    "rome": ("llama3", '{"city": "Rome"}', '{"city": "Rome"}', [], "stop"),
}
SCRIPTS = {task: [*answer[1].encode(), EOS] for task, answer in ANSWERS.items()}


@pytest.fixture(scope="module")
def servers():
    """A server for each format."""
    with (
        serving(tokenizer=ByteTokenizer(FORMATS["hermes"]), scripts=SCRIPTS) as hermes,
        serving(tokenizer=ByteTokenizer(FORMATS["llama3"]), scripts=SCRIPTS) as llama3,
        serving(tokenizer=ByteTokenizer(FORMATS["json_list"]), scripts=SCRIPTS) as json_list,
    ):
        yield {"hermes": hermes, "llama3": llama3, "json_list": json_list}


@pytest.fixture(scope="module")
def server(servers):
    return servers["hermes"]


def body(task, **fields):
    return {"model": task, "messages": [USER], "tools": TOOLS, **fields}


def joined(chunks, index=0):
    """The message, finish reason and logprobs of a streamed choice; every delta must have what OpenAI's have."""
    choices = [one for chunk in chunks for one in chunk["choices"] if one["index"] == index]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [one["finish_reason"] for one in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["delta"] == {}
    content, calls, entries = "", [], []
    for one in choices[1:-1]:
        (kind,) = one["delta"]
        if kind == "content":
            content += one["delta"]["content"]
        else:
            (call,) = one["delta"]["tool_calls"]
            if "id" in call:
                assert (call["index"], call["type"], call["function"]["arguments"]) == (len(calls), "function", "")
                calls.append({name: value for name, value in call.items() if name != "index"})
            else:
                assert set(call) == {"index", "function"}
                assert call["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += call["function"].pop("arguments")
                assert call["function"] == {}
        entries += one["logprobs"]["content"] if one["logprobs"] else []
    message = {"role": "assistant", "content": content if content or not calls else None}
    return message | ({"tool_calls": calls} if calls else {}), choices[-1]["finish_reason"], entries


def without_ids(message):
    ids = [call.pop("id") for call in message.get("tool_calls", [])]
    assert all(one.startswith("call_") for one in ids)
    assert len(set(ids)) == len(ids)
    return message


def ask(server, **fields):
    """The first choice's message without ids, and its finish reason: as a stream they must be those of the whole answer."""
    whole = server.client.post(CHAT, json=fields).json()
    chunks = server.stream(CHAT, **fields, stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    results = []
    for choice in whole["choices"]:
        message, reason, entries = joined(chunks, choice["index"])
        assert without_ids(message) == without_ids(choice["message"])
        assert reason == choice["finish_reason"]
        assert entries == (choice["logprobs"] or {"content": []})["content"]
        results.append((message, reason))
    return results[0]


def read(message):
    return message["content"], [
        (call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])
    ]


@pytest.mark.parametrize("task", ANSWERS)
def test_answers_are_split_into_text_and_calls(servers, task):
    form, _, content, calls, reason = ANSWERS[task]
    message, ended = ask(servers[form], **body(task, n=3, logprobs=True, top_logprobs=1))
    assert (*read(message), ended) == (content, calls, reason)


@pytest.mark.parametrize("task", ["text", "around", "two", "objects", "list"])
def test_the_openai_client_reads_the_calls(servers, task):
    form, _, content, calls, reason = ANSWERS[task]
    client = openai.OpenAI(base_url=f"{servers[form].client.base_url}/v1", api_key="none", max_retries=0)
    whole = client.chat.completions.create(**body(task))
    with client.chat.completions.stream(**body(task)) as stream:
        events = list(stream)
        streamed = stream.get_final_completion()
    for completion in (whole, streamed):
        (choice,) = completion.choices
        made = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        assert (choice.message.content or None, made) == (content or None, calls)
        assert choice.finish_reason == reason
    arguments = [event.arguments for event in events if event.type == "tool_calls.function.arguments.done"]
    assert arguments == [text for _, text in calls]


@pytest.mark.parametrize("max_tokens", [5, 20, 50, 60])
def test_an_answer_cut_by_max_tokens_says_length(server, max_tokens):
    message, reason = ask(server, **body("one", max_tokens=max_tokens))
    content, calls = read(message)
    assert reason == "length"
    shown = HERMES.encode()[:max_tokens].decode(errors="replace")
    if max_tokens < 40:
        assert (content, calls) == (shown, [])
    else:
        ((name, arguments),) = calls
        assert (content, name) == (None, "get_weather")
        assert shown.endswith(arguments)


def test_stop_strings_apply_to_the_text_of_the_calls(server):
    for stop in ("</tool_call>", "\n</tool", "}\n<"):
        message, reason = ask(server, **body("one", stop=stop))
        assert (*read(message), reason) == (None, CALLS[:1], "tool_calls")
    message, reason = ask(server, **body("one", stop='"near"'))
    assert (*read(message), reason) == (None, [("get_weather", OSLO.split('"near"')[0])], "tool_calls")
    message, reason = ask(server, **body("one", stop="<tool_call>"))
    assert (*read(message), reason) == ("", [], "stop")


def test_without_parallel_calls_the_answer_ends_behind_the_first(servers):
    for task, form in (("two", "hermes"), ("objects", "llama3"), ("list", "json_list")):
        message, reason = ask(servers[form], **body(task, parallel_tool_calls=False))
        assert (*read(message), reason) == (None, CALLS[:1], "tool_calls")
    message, _ = ask(servers["hermes"], **body("around", parallel_tool_calls=False))
    assert read(message) == ("I look.", CALLS[:1])


def test_without_tools_or_with_none_the_text_is_unchanged(server):
    for fields in ({"tools": []}, {"tools": None}, {"tool_choice": "none"}):
        message, reason = ask(server, **body("one", **fields))
        assert (message, reason) == ({"role": "assistant", "content": HERMES}, "stop")
    # The prompt is the same, so that an agent's last call, without tools, shares it with those before.
    tokens = [
        server.client.post(CHAT, json=body("text", tool_choice=choice)).json()["usage"]["prompt_tokens"]
        for choice in ("none", "auto")
    ]
    assert tokens[0] == tokens[1]


def test_functions_of_the_older_form_are_answered_in_it(server):
    functions = [one["function"] for one in TOOLS]
    fields = {"model": "two", "messages": [USER], "functions": functions, "function_call": "auto"}
    choice = server.client.post(CHAT, json=fields).json()["choices"][0]
    call = {"name": "get_weather", "arguments": OSLO}
    assert choice["message"] == {"role": "assistant", "content": None, "function_call": call}
    assert choice["finish_reason"] == "function_call"
    chunks = [chunk["choices"][0] for chunk in server.stream(CHAT, **fields)]
    deltas = [chunk["delta"].get("function_call") for chunk in chunks[1:-1]]
    assert deltas[0] == {"name": "get_weather", "arguments": ""}
    assert "".join(delta["arguments"] for delta in deltas) == OSLO
    assert chunks[-1]["finish_reason"] == "function_call"
    answer = server.client.post(CHAT, json={**fields, "function_call": "none"}).json()["choices"][0]["message"]
    assert answer["content"].startswith("<tool_call>")


CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
TURNS = [
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "sun"}], "name": "get_weather"},
    ],
    [
        {"role": "assistant", "content": "", "tool_calls": [CALL], "refusal": None, "audio": None, "annotations": []},
        {"role": "tool", "tool_call_id": "another", "content": "rain"},
    ],
    [
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "It rains.", "tool_calls": None, "function_call": None},
        {"role": "user", "content": "And tomorrow?"},
    ],
    [
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "get_weather", "content": "rain"},
    ],
]


@pytest.mark.parametrize("turns", TURNS)
def test_conversations_with_calls_and_results(server, turns):
    # What the tokenizer makes of them is tested with real templates.
    message, reason = ask(server, **body("one", messages=[USER, *turns]))
    assert (*read(message), reason) == (None, CALLS[:1], "tool_calls")


def test_calls_are_counted_by_task(server):
    def counts():
        lines = dict(line.rsplit(" ", 1) for line in server.client.get("/metrics").text.splitlines() if line[0] != "#")
        names = ("pshare_tool_calls_total", "pshare_broken_tool_calls_total")
        return [float(lines.get(f'{name}{{task="{task}"}}', 0)) for task in ("two", "no call") for name in names]

    before = counts()
    for task in ("two", "no call"):
        ask(server, **body(task))
    assert [after - one for one, after in zip(before, counts(), strict=True)] == [4, 0, 0, 2]


def test_the_schema_lists_the_fields(server):
    text = json.dumps(server.client.get("/openapi.json").json())
    for word in ("parallel_tool_calls", "tool_choice", "required", "strict", "function_call"):
        assert f'"{word}"' in text


# --- calls that the answer must have -----------------------------------------------------------------------------------

NAMED = {"type": "function", "function": {"name": "get.time"}}


@pytest.mark.parametrize("form", ["hermes", "llama3", "json_list"])
@pytest.mark.parametrize(("choice", "parallel"), [("required", True), ("required", False), (NAMED, True)])
def test_a_forced_answer_is_a_call(servers, form, choice, parallel):
    """The script writes something else; the grammar corrects it. Several calls may go on for ever."""
    closed = [tool(name) for name in ("get_weather", "get.time")]
    for one in closed:
        one["function"]["parameters"] |= {"properties": {}, "additionalProperties": False}
    fields = {"tools": closed, "tool_choice": choice, "parallel_tool_calls": parallel, "max_tokens": 120}
    message, reason = ask(servers[form], **body("text", **fields))
    content, calls = read(message)
    if not parallel or choice == NAMED:
        assert (content, len(calls), reason) == (None, 1, "tool_calls")
    for name, arguments in calls if reason == "tool_calls" else calls[:-1]:
        assert name == "get.time" if choice == NAMED else name in ("get_weather", "get.time")
        assert json.loads(arguments) == {}


def test_strict_arguments_follow_their_schema(server):
    city = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    city["additionalProperties"] = False
    strict = {"type": "function", "function": {"name": "get_weather", "strict": True, "parameters": city}}
    fields = body("one", tools=[strict], max_tokens=200)
    message, reason = ask(server, **{**fields, "tool_choice": "auto"})
    ((name, arguments),) = read(message)[1]
    assert (name, json.loads(arguments), reason) == ("get_weather", {"city": "Rome"}, "tool_calls")
    assert read(ask(server, **{**fields, "model": "text"})[0]) == ("No <tool> is {needed}.\n", [])


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_schemas_that_cannot_be_obeyed_are_refused_by_keyword(server, choice):
    wrong = tool("f")
    wrong["function"] |= {
        "strict": True,
        "parameters": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}},
    }
    error = error_of(server.client.post(CHAT, json=body("one", tools=[wrong], tool_choice=choice)), 400)
    assert error["param"] == "tools"
    assert "keyword: not" in error["message"]


def test_with_a_response_format_the_answer_is_in_it_or_calls(servers):
    city = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    fields = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": city}},
        "max_tokens": 200,
    }
    for form, task in (("hermes", "one"), ("llama3", "object"), ("json_list", "list")):
        message, reason = ask(servers[form], **body(task, **fields))
        assert read(message)[1][0] == CALLS[0]
        assert (message["content"], reason) == (None, "tool_calls")
        message, reason = ask(servers[form], **body("rome", **fields))
        assert (read(message), reason) == (('{"city": "Rome"}', []), "stop")
        fields = {"guided_json": city, "max_tokens": 200}
    forced, _ = ask(servers["hermes"], **body("one", **fields, tool_choice=NAMED))
    assert read(forced)[1][0][0] == "get.time"
