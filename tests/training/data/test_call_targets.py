"""Function calls as training targets: the module's format, whatever the records' spelling, behind the server's prompt."""

import json

import pytest
from chats import TOOL_TEMPLATES, called, result, tool_tokenizers, user
from training_data import NO_LIMITS, write_jsonl

from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings
from pshare_jax.text.chat_style import ChatLayout, ChatStyle
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.text.tool_format import FORMATS, calls_text
from pshare_jax.training.config import TrainConfig, check_train_config
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.data.records import RecordReader

pytestmark = pytest.mark.host
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CITY = {"city": "Zürich <b>"}
STYLES = {
    "plain": ChatStyle(),
    "json_list": ChatStyle(FORMATS["json_list"]),
    "hermes, last": ChatStyle(FORMATS["hermes"], "last"),
    "llama3, drop": ChatStyle(FORMATS["llama3"], "drop"),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folders = tool_tokenizers(tmp_path_factory.mktemp("tool-tokenizers"))
    return {name: Tokenizer.from_folder(folder) for name, folder in folders.items()}


def conversation(arguments) -> list[dict]:
    turns = [*user("Weather?"), called(arguments), result("rain"), {"role": "assistant", "content": "It rains."}]
    return [{"role": "system", "content": "Be kind."}, *turns]


def texts_of(tokenizer, samples) -> list[tuple[str, str]]:
    """Prompt and target of every turn."""

    def text(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    return [(text(s.ids[:start]), text(s.ids[start:end])) for s in samples for start, end in s.turns]


@pytest.mark.parametrize("name", TOOL_TEMPLATES)
@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
def test_arguments_as_text_and_as_object_train_the_same(tokenizers, name, style):
    """Case N1-02; the targets are calls in the format, without an escape, and the prompts are the server's."""
    ours = tokenizers[name]
    reader = RecordReader(ours, ours.eos_ids, True, NO_LIMITS, style)
    tools = None if ours.tool_format(style) is None else TOOLS
    messages = conversation(CITY)

    def samples(record):
        return reader.samples({"tools": tools, **record}, "a", 1)[0]

    made = samples({"messages": messages})
    assert samples({"messages": conversation(json.dumps(CITY))}) == made
    # Tables keep both as text.
    assert samples({"messages": json.dumps(messages), "tools": json.dumps(tools)}) == made
    (first, call), (second, answer) = texts_of(ours, made)
    for text, index in ((first, 2), (second, 4)):
        asked = ours.encode_chat(messages[:index], tools=tools, style=style)
        assert text == ours.decode(asked, skip_special_tokens=False)
    assert "\\" not in call
    if style.tool_format is not None and (name, style.tool_format.name) != ("mistral", "json_list"):
        assert call.startswith(calls_text(style.tool_format, [("weather", CITY)])) or name in ("qwen3", "mistral")
        assert calls_text(style.tool_format, [("weather", CITY)]) in call
    assert "It rains." in answer
    assert ("Be kind." in first) is (style.system != "drop")


def test_the_style_of_a_config_reaches_the_samples(tokenizers, tmp_path):
    """And the prompt of an evaluation in that style."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": conversation(CITY), "tools": TOOLS}])
    ours, style = tokenizers["plain"], ChatStyle(FORMATS["json_list"], "last")
    plain, styled = (prepare(DataConfig([SourceConfig(path)]), ours, ours.eos_ids, style=s) for s in (None, style))
    assert '[{"name": "weather", "arguments"' in texts_of(ours, styled.train.store)[0][1]
    assert "<tool_call>" in texts_of(ours, plain.train.store)[0][1]


def test_keys_of_the_module(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("base: m\noutput: o\ndata: {sources: [{path: x}]}\n")
    config = load_settings(TrainConfig, path)
    assert config.module.style == ChatStyle()
    config = load_settings(TrainConfig, path, ["module.tool_format=json_list", "module.layout.system=last"])
    check_train_config(config)
    assert config.module.layout == ChatLayout("last")
    assert config.module.style == ChatStyle(FORMATS["json_list"], "last")
    for override, words in (
        ("module.tool_format=xml", "module.tool_format 'xml'"),
        ("module.tool_format={start: 1}", "module.tool_format"),
        ("module.layout.system=middle", "module.layout.system 'last'"),
    ):
        with pytest.raises(PshareError, match=r"^[^\n]*$") as caught:
            check_train_config(load_settings(TrainConfig, path, [override]))
        assert all(word in str(caught.value) for word in words.split()), str(caught.value)
