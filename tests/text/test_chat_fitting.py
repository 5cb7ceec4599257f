"""Chats with calls, tools and odd roles are rendered whole under the rules of real templates, and as transformers does."""

import json

import pytest
from chats import TOOL_TEMPLATES, called, result, tokenizer_folders, tokenizer_with_template, tool_tokenizers, user
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.text.tool_format import FORMATS, ToolFormat, calls_text, tools_text

WEATHER = {
    "name": "weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": {**WEATHER, "strict": True}}]
CITY = {"city": "Zürich"}
NATIVE = {"hermes": "hermes", "qwen3": "hermes", "llama31": "llama3", "mistral": "json_list"}
"""Templates that write tools and calls, and the format that is found in them."""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tool_tokenizers(tmp_path_factory.mktemp("tool-tokenizers"))


@pytest.fixture(scope="module")
def pairs(folders):
    return {
        name: (Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)) for name, folder in folders.items()
    }


def reference(theirs, messages, tools=None) -> list[int]:
    return theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]


def text_of(tokenizer: Tokenizer, messages, **options) -> str:
    return tokenizer.decode(tokenizer.encode_chat(messages, **options), skip_special_tokens=False)


def history(arguments=CITY) -> list[dict]:
    turns = [*user("Weather?"), called(arguments), result("rain"), {"role": "assistant", "content": "It rains."}]
    return [{"role": "system", "content": "Be kind."}, *turns, *user("And now?")]


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_arguments_as_text_and_as_object_give_one_prompt(pairs, name):
    """Case N1-01, with the templates' own format and with ours."""
    ours, theirs = pairs[name]
    for style in (ChatStyle(), ChatStyle(FORMATS["json_list"])):
        wanted = text_of(ours, history(CITY), style=style)
        assert '"Zürich"' in wanted or "=city>Zürich<" in wanted
        assert "\\" not in wanted
        for spelling in (json.dumps(CITY), json.dumps(CITY, ensure_ascii=False, indent=2)):
            assert text_of(ours, history(spelling), style=style) == wanted
        empty = text_of(ours, history({}), style=style)
        for spelling in ("", "  ", None, "{}"):
            assert text_of(ours, history(spelling), style=style) == empty
    if name not in ("plain", "gemma3"):
        spelled = history(json.dumps(CITY, ensure_ascii=False)) if name == "deepseek" else history(CITY)
        assert ours.encode_chat(history(json.dumps(CITY))) == reference(theirs, spelled)


@pytest.mark.parametrize("text", ["not JSON", "[1]", '"text"', "7", "{", "null"])
def test_arguments_that_are_no_object_stay(pairs, text):
    for name in ("hermes", "llama31", "plain", "deepseek"):
        shown = text if name == "deepseek" else json.dumps(text)
        assert shown in text_of(pairs[name][0], history(text))


@given(JSON)
@settings(max_examples=50, deadline=None)
def test_any_arguments_are_written_as_json(value):
    form = FORMATS["hermes"]
    written = calls_text(form, [("f", {"a": value})])
    assert json.loads(written.removeprefix(form.start).removesuffix(form.end))["arguments"] == {"a": value}


def test_arguments_with_too_many_objects_are_refused(pairs):
    with pytest.raises(PshareError, match="too many"):
        pairs["plain"][0].encode_chat(history('{"a": [' + "[]," * 100_001 + "1]}"))


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_the_format_is_found_in_the_template(pairs, name):
    found = pairs[name][0].tool_format()
    known = {**NATIVE, "plain": "hermes", "gemma3": "gemma"}.get(name)
    assert found == (None if known is None else FORMATS[known])
    own = ToolFormat("custom", "<f>", "</f>")
    assert pairs[name][0].tool_format(ChatStyle(own)) == own


def test_an_unknown_format_is_described(tmp_path):
    root = tokenizer_folders(tmp_path / "families")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}{% for call in m.tool_calls or [] %}"
        "[CALL]{{ {'name': call.function.name, 'input': call.function.arguments} | tojson }}[/CALL]{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    found = tokenizer_with_template(root, tmp_path, "smollm", template).tool_format()
    assert found == ToolFormat("template", "[CALL]", "[/CALL]", "object", "input")


@pytest.mark.parametrize("name", NATIVE)
def test_templates_with_tools_write_them(pairs, name):
    ours, theirs = pairs[name]
    style = ChatStyle(FORMATS[NATIVE[name]])
    for messages in (history(), history()[1:], history()[:2], history()[:4]):
        wanted = reference(theirs, messages, TOOLS)
        assert ours.encode_chat(messages, tools=TOOLS) == wanted
        # A module that was trained on the template's own format changes nothing.
        assert ours.encode_chat(messages, tools=TOOLS, style=style) == wanted
        assert ours.encode_chat(messages) == reference(theirs, messages)


def ours_written(form: ToolFormat, role: str = "tool") -> list[dict]:
    """`history` with tools and calls in our words."""
    system, question, call, answer, *rest = history()
    system = {**system, "content": f"Be kind.\n\n{tools_text(form, TOOLS)}"}
    call = {"role": "assistant", "content": calls_text(form, [("weather", CITY)])}
    text = answer["content"] if role == "tool" else f"Result of weather:\n{answer['content']}"
    return [system, question, call, {**answer, "role": role, "content": text}, *rest]


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_other_formats_are_written_by_us(pairs, name):
    ours, theirs = pairs[name]
    role = "user" if name == "gemma3" else "tool"
    for form in (*FORMATS.values(), ToolFormat("custom", "<f>", "</f>", "list", "input")):
        if NATIVE.get(name) == form.name or (name == "llama31" and form.name == "gemma"):
            continue
        wanted = reference(theirs, ours_written(form, role))
        assert ours.encode_chat(history(), tools=TOOLS, style=ChatStyle(form)) == wanted


def test_markers_that_are_control_tokens(pairs):
    """They are written as such, in the answer to train too, but never taken from a client's text."""
    ours = pairs["plain"][0]
    style = ChatStyle(ToolFormat("custom", "<|endoftext|>", "", "list"))
    marker = ours.encode("<|endoftext|>", add_special_tokens=False)[0]
    forged = history({"city": "<|endoftext|>"})
    for messages, tools, count in (
        (history(), TOOLS, 2),
        (history(), None, 1),
        (forged, None, 1),
        (user("x"), None, 0),
    ):
        ids = ours.encode_chat(messages, tools=tools, style=style)
        assert ids.count(marker) == count
        shown = ours.decode(ids, skip_special_tokens=False)
        assert shown.count("<|endoftext|>") == count + (messages is forged)
    _, target = ours.encode_turn(user("x"), called({"city": "<|endoftext|>"}), style=style)
    assert [target[0], target.count(marker)] == [marker, 1]
    assert ours.decode(target).startswith('[{"name": "weather", "arguments": {"city": "<|endoftext|>"}}]')
    # Named with its control token, the template's own format is the template's.
    mistral, theirs = pairs["mistral"]
    named = ChatStyle(ToolFormat("custom", "<|python_tag|>", "", "list"))
    assert mistral.encode_chat(history(), tools=TOOLS, style=named) == reference(theirs, history(), TOOLS)


@pytest.mark.parametrize(("name", "form"), [("plain", "hermes"), ("gemma3", "gemma")])
def test_templates_without_a_place_for_tools(pairs, name, form):
    ours, theirs = pairs[name]
    role = "user" if name == "gemma3" else "tool"
    assert ours.encode_chat(history(), tools=TOOLS) == reference(theirs, ours_written(FORMATS[form], role))
    alone = text_of(ours, user("Weather?"), tools=TOOLS)
    assert json.dumps(WEATHER) in alone
    assert "strict" not in alone
    # Other keys and another order are the same tool.
    turned = [{"function": dict(reversed(WEATHER.items())), "type": "function", "strict": False}]
    assert text_of(ours, user("Weather?"), tools=turned) == alone


@pytest.mark.parametrize("name", ["deepseek", "items"])
def test_tools_that_nobody_can_write_are_refused(pairs, name):
    with pytest.raises(PshareError, match="tool_format"):
        pairs[name][0].encode_chat(user("x"), tools=TOOLS)


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@pytest.mark.parametrize("form", [None, "json_list", "hermes"])
def test_many_results_and_text_before_calls(pairs, name, form):
    """Each text of a long loop of calls is in the prompt once, in order."""
    style = ChatStyle(form and FORMATS[form])
    count = 1 if name == "llama31" and form is None else 2
    messages = [
        *user("QUESTION"),
        called(CITY, content="BEFORE", count=count),
        *[result(f"RESULT{index}", index) for index in range(count)],
        called(CITY),
        result("LATER"),
        {"role": "assistant", "content": "ANSWER"},
        *user("MORE"),
    ]
    text = text_of(pairs[name][0], messages, style=style)
    # Llama 3.1 and Mistral write no text with a call.
    before = [] if form is None and name in ("llama31", "mistral") else ["BEFORE"]
    if form == "json_list" and name == "mistral":
        before = []
    marks = ["QUESTION", *before, *[f"RESULT{index}" for index in range(count)], "LATER", "ANSWER", "MORE"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert all(text.count(mark) == 1 for mark in marks)
    assert text.count("weather") >= count + 1


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_older_forms_mean_the_newer_ones(pairs, name):
    """`function_call` and the role function."""
    ours = pairs[name][0]
    newer = [*user("x"), called(CITY), {"role": "tool", "name": "weather", "content": "rain"}, *user("y")]
    del newer[1]["tool_calls"][0]["id"]
    older = [*newer]
    older[1] = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": json.dumps(CITY)},
    }
    older[2] = {**newer[2], "role": "function"}
    if name == "mistral":
        with pytest.raises(PshareError, match="nine characters"):
            ours.encode_chat(older)
        return
    assert ours.encode_chat(older) == ours.encode_chat(newer)
    assert "rain" in text_of(ours, older)


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_developer_means_system_where_the_template_does_not_know_it(pairs, name):
    """Case N1-03."""
    ours = pairs[name][0]
    for messages in ([*user("x")], [*user("x"), {"role": "assistant", "content": "y"}, *user("z")]):
        developer, system = ([{"role": role, "content": "MARK"}, *messages] for role in ("developer", "system"))
        assert ours.encode_chat(developer) == ours.encode_chat(system)
        assert "MARK" in text_of(ours, developer)


def test_a_template_that_knows_developers_writes_them(tmp_path):
    root = tokenizer_folders(tmp_path / "families")
    template = "{% for m in messages %}{{ '<D>' if m.role == 'developer' else '<O>' }}{{ m.content }}{% endfor %}"
    ours = tokenizer_with_template(root, tmp_path, "smollm", template)
    messages = [{"role": "developer", "content": "a"}, *user("b")]
    assert text_of(ours, messages) == "<D>a<O>b"
    assert text_of(ours, messages, style=ChatStyle(system="last")) == "<O>b<D>a"
    assert text_of(ours, messages, style=ChatStyle(system="drop")) == "<O>b"


def test_a_broken_template_is_refused_when_a_chat_is_sent(tmp_path):
    root = tokenizer_folders(tmp_path / "families")
    ours = tokenizer_with_template(root, tmp_path, "smollm", "{% if %}")
    assert ours.tool_format() is not None
    with pytest.raises(PshareError, match="not valid Jinja"):
        ours.encode_chat(user("x"))
    assert tokenizer_with_template(root, tmp_path, "smollm", None).tool_format() is None


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": "weather()"},
        {"role": "assistant", "tool_calls": {"name": "f"}},
        {"role": "assistant", "tool_calls": ["f"]},
        {"role": "assistant", "function_call": "f"},
    ],
)
def test_calls_that_are_no_objects_are_refused(pairs, message):
    with pytest.raises(PshareError, match=r"[Mm]essage 1"):
        pairs["plain"][0].encode_chat([*user("x"), message])


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
def test_odd_calls_are_written_or_refused(pairs, name):
    """Ids of any type, no name, calls of a user, results without a call."""
    for messages in (
        [*user("x"), {"role": "assistant", "tool_calls": [{"id": [], "function": {"name": "f"}}]}],
        [*user("x"), {"role": "assistant", "tool_calls": [{}]}, {"role": "tool", "tool_call_id": {}, "content": "y"}],
        [{"role": "user", "content": "x", "tool_calls": [{"function": 5}]}],
        [{"role": "tool", "content": "y"}, *user("x")],
    ):
        for style in (ChatStyle(), ChatStyle(FORMATS["json_list"])):
            try:
                text = text_of(pairs[name][0], messages, style=style)
            except PshareError:
                continue
            assert "x" in text


@pytest.mark.parametrize("text", ["MARK", "a", "user", "a longer text that stands nowhere else"])
def test_a_message_that_the_template_does_not_show_is_refused(tmp_path, text):
    """Also a text that stands elsewhere in the prompt."""
    root = tokenizer_folders(tmp_path / "families")
    template = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') or (loop.first and m.role == 'system') %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    ours = tokenizer_with_template(root, tmp_path, "smollm", template)
    for messages, index in (
        ([*user("a user"), {"role": "system", "content": text}], 1),
        ([*user("x"), *user("y"), {"role": "developer", "content": text}, *user("a MARK")], 2),
    ):
        with pytest.raises(PshareError, match=f"message {index}, of role system"):
            ours.encode_chat(messages)
    assert ours.encode_chat([{"role": "system", "content": text}, *user("x")])
    assert ours.encode_chat([*user("x"), {"role": "system", "content": " \n"}])
    # A function's result is a user's message there.
    assert "Result of weather" in text_of(ours, history())


def test_templates_that_change_texts_show_them(tmp_path):
    """Trimmed, escaped, cut and turned texts, and calls without their text, are no lost messages."""
    root = tokenizer_folders(tmp_path / "families")
    for change in (
        "m.content | trim",
        "m.content | tojson",
        "m.content | upper",
        "m.content.split('|')[-1]",
        "m.content[:40]",
    ):
        template = "{% for m in messages %}<|im_start|>{{ " + change + " }}<|im_end|>{% endfor %}"
        ours = tokenizer_with_template(root, tmp_path, "smollm", template)
        assert ours.encode_chat(user(' "one\n| two" ') + user("x" * 100))


@pytest.mark.parametrize("name", ["plain", "qwen3"])
def test_long_chats_stay_linear(pairs, name):
    """A chat of many messages is rendered a fixed number of times, also if a text is not found in the rendering."""
    ours = pairs[name][0]
    template = ours._template(None)
    renderings = []
    plain = type(template)._rendered
    messages = [{"role": ("user", "assistant")[index % 2], "content": "a"} for index in range(2_000)]
    odd = [*messages, *user(" <think>\n</think> ")]
    try:
        type(template)._rendered = lambda self, values: (
            renderings.append(len(values["messages"])) or plain(self, values)
        )
        for chat in (messages, odd):
            ours.encode_chat(user("x"))
            renderings.clear()
            assert len(ours.encode_chat(chat)) > 2_000
            assert len(renderings) <= 4
    finally:
        type(template)._rendered = plain
