"""POST /v1/responses over real sockets, by OpenAI's own client and by hand."""

import json
import re
import time
from typing import Literal

import httpx
import openai
import pydantic
import pytest
from fake_server import FAMILY, MAX_LEN, error_of, serving
from responses_checks import checked, checked_stream, events_of, plain
from serving_fakes import EOS

from pshare_jax.engine.request import ABORTED
from pshare_jax.server import event_stream

pytestmark = pytest.mark.host
PATH = "/v1/responses"


@pytest.fixture(scope="module")
def server():
    with serving(max_body_bytes=200_000) as running:
        yield running


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="none", max_retries=0) as made:
        yield made


def post(server, **fields):
    return server.client.post(PATH, json={"model": "abc", "input": "p", **fields})


def ask(server, **fields):
    """The response, streamed and whole: both must agree."""
    server.client.post("/flush_cache")
    whole = checked(post(server, **fields).json())
    server.client.post("/flush_cache")
    response = post(server, **fields, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    streamed = checked_stream(response.text)
    assert plain(streamed) == plain(whole)
    assert streamed["id"] != whole["id"]
    return whole


def text_of(response):
    (item,) = response["output"]
    return item["content"][0]["text"]


def test_texts_and_ends(server):
    for model, text in (("abc", "ABCDEFGH"), ("org/math-v1.5", "math"), ("qwen3:mit Leer ü", FAMILY)):
        response = ask(server, model=model)
        assert (text_of(response), response["status"], response["model"]) == (text, "completed", model)
    response = ask(server, model="endless", max_output_tokens=7)
    assert (text_of(response), response["usage"]["output_tokens"]) == ("x" * 7, 7)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert text_of(ask(server, stop="CDEF")) == "AB"
    assert text_of(ask(server, stop="A")) == ""
    assert text_of(ask(server, model="broken", max_output_tokens=6)) == ask_chat(server, model="broken", max_tokens=6)


def ask_chat(server, **fields):
    body = {"model": "abc", "messages": [{"role": "user", "content": "p"}], **fields}
    return server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_the_prompt_is_that_of_a_chat(server):
    server.client.post("/flush_cache")
    messages = [{"role": "system", "content": "s" * 20}, {"role": "user", "content": "u" * 50}]
    chat = server.client.post("/v1/chat/completions", json={"model": "abc", "messages": messages}).json()["usage"]
    usage = post(server, instructions="s" * 20, input=messages[1:]).json()["usage"]
    assert usage["input_tokens"] == chat["prompt_tokens"] == 71
    # The chat left the same tokens in the cache.
    assert usage["input_tokens_details"]["cached_tokens"] == 64


def test_the_request_is_echoed(server):
    fields = {
        "instructions": "be brief",
        "metadata": {"run": "7"},
        "temperature": 0.5,
        "top_p": 0.25,
        "max_output_tokens": 12,
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "parallel_tool_calls": False,
    }
    response = ask(server, **fields)
    assert fields.items() <= response.items()
    assert (response["previous_response_id"], response["store"], response["truncation"]) == (None, False, "disabled")


def test_openais_client_creates_and_streams(server, client):
    made = client.responses.create(model="abc", input="p", instructions="be", include=["message.output_text.logprobs"])
    assert made.output_text == "ABCDEFGH"
    assert [entry.token for entry in made.output[0].content[0].logprobs] == [*"ABCDEFGH"]
    with client.responses.stream(model="abc", input=[{"role": "user", "content": "p"}]) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == "ABCDEFGH"
    assert (final.status, final.usage.output_tokens) == ("completed", 9)
    # The next turn, as frameworks write it: all items so far.
    again = [{"role": "user", "content": "p"}, *final.output, {"role": "user", "content": "more"}]
    assert client.responses.create(model="abc", input=again).usage.input_tokens == len("p\nABCDEFGH\nmore")


class City(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    city: Literal["Rome", "Bonn"]


def test_formats_constrain_the_answer(server, client):
    schema = {"type": "json_schema", "name": "city", "schema": City.model_json_schema(), "strict": True}
    response = ask(server, text={"format": schema, "verbosity": "low"})
    assert City.model_validate_json(text_of(response))
    assert response["text"]["format"] == schema
    any_object = {"format": {"type": "json_object"}}
    assert isinstance(json.loads(text_of(ask(server, text=any_object, max_output_tokens=80))), dict)
    parsed = client.responses.parse(model="abc", input="p", text_format=City)
    assert isinstance(parsed.output_parsed, City)
    with client.responses.stream(model="abc", input="p", text_format=City) as stream:
        assert isinstance(stream.get_final_response().output_parsed, City)
    assert text_of(ask(server, guided_choice=["yes"])) == "yes"


BEGUN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, {}),
        ({"type": "object"}, {"guided_regex": "a"}),
        ({"type": "object"}, {"input": BEGUN, "continue_final_message": True, "add_generation_prompt": False}),
    ],
)
def test_formats_that_cannot_be_obeyed_are_refused_by_their_name_here(server, schema, fields):
    text = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    error = error_of(post(server, text=text, **fields), 400)
    assert "text.format" in error["message"]
    assert error["param"] in ("text.format", "guided_regex")
    assert "response_format" not in error["message"]


# --- function calls --------------------------------------------------------------------------------------------------


def written(name, **arguments):
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


class Script:
    """Answers with the text of the first rule whose key is in the prompt."""

    def __init__(self, rules):
        self.rules = rules

    def next_id(self, context, made):
        prompt = bytes(token for token in context[: len(context) - made] if token < 256).decode()
        ids = next(text for key, text in self.rules.items() if key in prompt).encode()
        return ids[made] if made < len(ids) else EOS


def flat_tool(name):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {"type": "function", "name": name, "parameters": {**parameters, "additionalProperties": False}}


TOOLS = [flat_tool("weather"), flat_tool("clock")]
RULES = {
    "thanks": "You are welcome.",
    "nine o'clock": "Sunny at nine.",
    "sunny": written("clock", city="Oslo"),
    "both": f"I look.\n{written('weather', city='Oslo')}\n{written('clock', city='Bergen')}",
    "": written("weather", city="Oslo ü"),
}
OUTPUTS = {"weather": "sunny", "clock": [{"type": "input_text", "text": "nine o'clock"}]}


@pytest.fixture
def scripted(server):
    decode = server.fakes.decode["abc"]
    before, decode.answer = decode.answer, Script(RULES)
    yield server
    decode.answer = before


def outputs_of(response):
    """What a client that runs the functions sends back."""
    calls = [item for item in response.output if item.type == "function_call"]
    return [{"type": "function_call_output", "call_id": call.call_id, "output": OUTPUTS[call.name]} for call in calls]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("question", "num_rounds"), [("weather?", 3), ("both?", 2)])
def test_openais_client_runs_functions_over_turns(scripted, client, streamed, question, num_rounds):
    def ask_with_tools(items):
        fields = {"model": "abc", "input": items, "tools": TOOLS, "instructions": "be"}
        if not streamed:
            return client.responses.create(**fields)
        with client.responses.stream(**fields) as stream:
            return stream.get_final_response()

    items, rounds = [{"role": "user", "content": question}], 0
    while True:
        response = ask_with_tools(items)
        rounds += 1
        items += [*response.output, *(outputs := outputs_of(response))]
        if not outputs:
            break
    assert (rounds, response.output_text) == (num_rounds, "Sunny at nine.")
    items.append({"role": "user", "content": "thanks"})
    assert ask_with_tools(items).output_text == "You are welcome."


def test_calls_as_items(scripted, client):
    response = ask(scripted, input="both", tools=TOOLS)
    kinds = [item["type"] for item in response["output"]]
    assert kinds == ["message", "function_call", "function_call"]
    assert [item["arguments"] for item in response["output"][1:]] == ['{"city": "Oslo"}', '{"city": "Bergen"}']
    assert response["tools"] == [{**tool, "description": None, "strict": False} for tool in TOOLS]
    (message, call) = ask(scripted, input="both", tools=TOOLS, parallel_tool_calls=False)["output"]
    assert (message["content"][0]["text"], call["name"]) == ("I look.", "weather")
    assert text_of(ask(scripted, input="both", tools=TOOLS, tool_choice="none")) == RULES["both"]
    assert text_of(ask(scripted, input="both")) == RULES["both"]
    cut = ask(scripted, input="weather?", tools=TOOLS, max_output_tokens=50)
    assert (cut["status"], cut["output"][0]["status"]) == ("incomplete", "incomplete")
    parsed = client.responses.parse(model="abc", input="weather?", tools=[{**TOOLS[0], "strict": True}])
    assert parsed.output[0].parsed_arguments == {"city": "Oslo ü"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "clock"}])
def test_a_forced_answer_is_a_call(scripted, choice):
    """The script would write text; the grammar makes it a call."""
    city = {"type": "object", "properties": {"city": {"const": "Rome"}}, "required": ["city"]}
    closed = [{**tool, "parameters": {**city, "additionalProperties": False}} for tool in TOOLS]
    response = ask(scripted, input="thanks", tools=closed, tool_choice=choice, parallel_tool_calls=False)
    (call,) = response["output"]
    assert (call["type"], response["tool_choice"]) == ("function_call", choice)
    assert call["name"] == "clock" if isinstance(choice, dict) else call["name"] in OUTPUTS
    assert json.loads(call["arguments"]) == {"city": "Rome"}


def test_calls_are_counted(scripted):
    ask(scripted, input="both", tools=TOOLS)
    text = scripted.client.get("/metrics").text
    assert re.search(r'pshare_tool_calls_total\{task="abc"\} [1-9]', text)


def test_errors_of_tools_are_named(scripted):
    for fields, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nothing"}}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
    ):
        assert error_of(post(scripted, **fields), 400)["param"] == param


# --- errors and ends -------------------------------------------------------------------------------------------------


def test_errors_are_openais(server, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="abc", input="p", store=True)
    assert caught.value.param == "store"
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="nothing", input="p")
    assert missing.value.code == "model_not_found"
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            call("resp_1")
    for fields in ({"input": "p" * MAX_LEN}, {"max_output_tokens": MAX_LEN}):
        error = error_of(post(server, **fields), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    refusing = error_of(post(server, input=[{"role": "assistant", "content": "x"}]), 400)
    assert refusing["param"] == "input"


def test_long_bodies_and_long_answers(server):
    """They are parsed, and their lines written, in threads."""
    items = [{"role": "user", "content": [{"type": "input_text", "text": "x" * 15}]} for _ in range(50)]
    fields = {"input": items, "instructions": "i" * 20_000, "max_output_tokens": 3}
    assert text_of(ask(server, **fields)) == "ABC"
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 5}
    response = ask(server, model="endless", max_output_tokens=200, **logprobs)
    assert text_of(response) == "x" * 200
    assert len(response["output"][0]["content"][0]["logprobs"]) == 200


def test_a_disconnect_aborts(server):
    body = {"model": "endless", "input": "p", "max_output_tokens": 90_000, "stream": True}
    with httpx.stream("POST", f"{server.client.base_url}{PATH}", json=body) as response:
        lines = response.iter_lines()
        assert next(lines) == "event: response.created"
        assert server.engine.num_live == 1
    server.rest()
    with pytest.raises(httpx.ReadTimeout):
        server.client.post(PATH, json={**body, "stream": False}, timeout=0.2)
    server.rest()


def test_a_stop_fails_a_stream_in_openais_form():
    with serving() as stopping:
        body = {"model": "endless", "input": "p", "max_output_tokens": 90_000, "stream": True}
        with httpx.stream("POST", f"{stopping.client.base_url}{PATH}", json=body) as response:
            lines = response.iter_lines()
            head = [next(lines)]
            stopping.engine.stop()
            text = "\n".join([*head, *lines]) + "\n"
    final = checked_stream(text)
    assert final["status"] == "failed"
    assert final["error"] == {"code": "server_error", "message": ABORTED}


def test_a_late_stream_begins_with_a_comment(server, monkeypatch):
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", 0.02)
    server.fakes.decode["abc"].before = lambda: time.sleep(0.06)
    text = post(server, stream=True, max_output_tokens=2).text
    server.fakes.decode["abc"].before = lambda: None
    assert text.startswith(": waiting\n\n")
    assert checked_stream(text)["status"] == "incomplete"
    assert events_of(text)[0]["type"] == "response.created"


def test_the_schema_lists_the_fields(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    assert not any(path.startswith(PATH + "/") for path in paths)
    schema = paths[PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["model", "input"]
    assert {"instructions", "tools", "text", "temperature", "seed", "cache_salt"} <= set(schema["properties"])
    assert not {"messages", "n", "max_tokens", "response_format", "logprobs"} & set(schema["properties"])
