"""The chat style of each task reaches its prompts, and begun answers reach the engine as such."""

import pytest
from fake_server import error_of, serving
from serving_fakes import ByteTokenizer

from pshare_jax.errors import PshareError
from pshare_jax.server.config import ServeConfig, TaskConfig, check_config
from pshare_jax.server.tasks.styles import TaskStyles
from pshare_jax.settings import load_settings
from pshare_jax.text.chat_style import ChatLayout, ChatStyle
from pshare_jax.text.tool_format import FORMATS, ToolFormat

pytestmark = pytest.mark.host
CHAT = "/v1/chat/completions"
LAST = ChatStyle(FORMATS["json_list"], "last")
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The capital"}]


class NotingTokenizer(ByteTokenizer):
    """Notes how each chat was encoded."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def encode_chat(self, messages, *, add_generation_prompt=True, style=None, **options):
        self.noted.append(("chat", add_generation_prompt, style))
        return super().encode_chat(messages, **options)

    def encode_begun(self, messages, *, style=None, **options):
        ids, start = super().encode_begun(messages, **options)
        self.noted.append(("begun", start, style))
        return ids, start

    def tool_format(self, style=None):
        return style.tool_format if style and style.tool_format else FORMATS["hermes"]


@pytest.fixture(scope="module")
def tokenizer():
    return NotingTokenizer()


@pytest.fixture(scope="module")
def server(tokenizer):
    styles = {"endless": LAST}
    with serving(tokenizer=tokenizer, style_of=lambda task: styles.get(task, ChatStyle())) as running:
        yield running


@pytest.fixture
def requests(server, monkeypatch):
    """The engine requests that are made."""
    made, submit = [], server.engine.submit_all
    monkeypatch.setattr(server.engine, "submit_all", lambda new, takers: made.extend(new) or submit(new, takers))
    return made


def ask(server, **body):
    response = server.client.post(CHAT, json={"model": "abc", "messages": MESSAGES, "max_tokens": 2, **body})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("task", "style"), [("abc", ChatStyle()), ("endless", LAST)])
def test_prompts_have_the_style_of_their_task(server, tokenizer, task, style):
    for path in (CHAT, "/tokenize"):
        for fields in ({}, {"continue_final_message": True}):
            tokenizer.noted.clear()
            body = {"model": task, "messages": MESSAGES, **fields, **({"max_tokens": 2} if path == CHAT else {})}
            assert server.client.post(path, json=body).status_code == 200
            assert tokenizer.noted[-1][0] == ("begun" if fields else "chat")
            assert tokenizer.noted[-1][2] == style


def test_models_show_format_and_layout(server):
    cards = {card["id"]: card for card in server.client.get("/v1/models").json()["data"]}
    assert (cards["endless"]["tool_format"], cards["endless"]["layout"]) == ("json_list", {"system": "last"})
    assert (cards["abc"]["tool_format"], cards["abc"]["layout"]) == ("hermes", {"system": "first"})


@pytest.mark.parametrize(
    "fields",
    [
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"messages": [MESSAGES[0], {**MESSAGES[1], "prefix": True}]},
        {"messages": [MESSAGES[0], {**MESSAGES[1], "prefix": True}], "add_generation_prompt": False},
    ],
)
def test_a_begun_answer_is_the_modules(server, requests, fields):
    """Case N1-10: its own KV begins where the answer does."""
    ask(server, **fields, n=2)
    assert [request.response_start for request in requests] == [len("q\n")] * 2
    assert bytes(requests[0].prompt).decode() == "q\nThe capital"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"continue_final_message": False},
        {"add_generation_prompt": True},
        {"messages": [{**MESSAGES[0], "prefix": True}]},
        {"messages": [MESSAGES[0], {**MESSAGES[1], "prefix": False}]},
        {"messages": [MESSAGES[0], {**MESSAGES[1], "prefix": True}, MESSAGES[0]]},
    ],
)
def test_a_closed_answer_is_history(server, requests, tokenizer, fields):
    tokenizer.noted.clear()
    ask(server, **fields)
    assert requests[0].response_start is None
    assert tokenizer.noted == [("chat", True, ChatStyle())]


def test_a_prompt_may_end_behind_the_last_message(server, requests, tokenizer):
    tokenizer.noted.clear()
    ask(server, add_generation_prompt=False)
    assert tokenizer.noted == [("chat", False, ChatStyle())]


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_both_ways_to_end_a_prompt_contradict_each_other(server, path):
    for fields in (
        {"continue_final_message": True, "add_generation_prompt": True},
        {"messages": [MESSAGES[0], {**MESSAGES[1], "prefix": True}], "add_generation_prompt": True},
    ):
        body = {"model": "abc", "messages": MESSAGES, **fields}
        error = error_of(server.client.post(path, json=body), 400)
        assert error["param"] == "add_generation_prompt"
        assert "continue_final_message" in error["message"]


# --- config ----------------------------------------------------------------------------------------------------------

FOLDER = ChatStyle(FORMATS["llama3"], "drop")


@pytest.mark.parametrize(
    ("task", "default", "module", "style"),
    [
        ("x", None, ChatStyle(), ChatStyle()),
        ("x", None, FOLDER, FOLDER),
        ("x", "hermes", FOLDER, FOLDER),
        ("x", "hermes", ChatStyle(), ChatStyle(FORMATS["hermes"])),
        (TaskConfig("x"), "hermes", ChatStyle(system="last"), ChatStyle(FORMATS["hermes"], "last")),
        (TaskConfig("x", "json_list"), "hermes", FOLDER, ChatStyle(FORMATS["json_list"], "drop")),
        (TaskConfig("x", layout=ChatLayout("first")), None, FOLDER, ChatStyle(FORMATS["llama3"])),
        (
            TaskConfig("x", {"start": "<f>"}, ChatLayout("last")),
            None,
            FOLDER,
            ChatStyle(ToolFormat("custom", "<f>"), "last"),
        ),
    ],
)
def test_the_config_counts_before_the_manifest(task, default, module, style):
    styles = TaskStyles(ServeConfig(base="m", tasks={"a": task}, tool_format=default))
    styles.put("a", module)
    styles.put("added", module)
    assert styles.of("a") == style
    assert styles.of("added").system == module.system


def test_tasks_of_a_config(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "base: m\ntool_format: hermes\ntasks:\n  a: base\n  b: {module: x/y, tool_format: {start: <f>, end: </f>}, "
        "layout: {system: last}}\n"
    )
    config = load_settings(
        ServeConfig, path, ["tasks.org/v1.5=base", "tasks.b.layout.system=drop", "tasks.c/v1.5.module=z"]
    )
    check_config(config)
    assert config.modules == {"a": "base", "b": "x/y", "org/v1.5": "base", "c/v1.5": "z"}
    assert config.tasks["b"] == TaskConfig("x/y", {"start": "<f>", "end": "</f>"}, ChatLayout("drop"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tool_format=xml", "tool_format 'xml' hermes"),
        ("tasks.b={module: x, tool_format: {begin: y}}", "tasks.b.tool_format 'begin'"),
        ("tasks.b={module: x, layout: {system: middle}}", "tasks.b.layout.system 'first' 'last' 'drop'"),
        ("tasks.b={tool_format: hermes}", "tasks.b.module missing"),
        ("tasks.b={module: x, style: y}", "tasks.b.style module tool_format layout"),
        ("tasks.a.layout={system: last}", "tasks.a map 'base'"),
    ],
)
def test_wrong_tasks_are_refused_by_key(tmp_path, override, words):
    path = tmp_path / "serve.yaml"
    path.write_text("base: m\ntasks: {a: base}\n")
    with pytest.raises(PshareError, match=r"^[^\n]*$") as caught:
        check_config(load_settings(ServeConfig, path, [override]))
    assert all(word in str(caught.value) for word in words.split()), str(caught.value)
