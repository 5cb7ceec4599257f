"""Fields of a record that change nothing in what is trained from it, so that none of them is lost in silence.

A field of a chat is without effect if its removal leaves the text of every trained turn as it is: the template does not write
it. Only texts are compared, which is cheap beside their encoding. `prepare.py` calls `unread_fields`, report.py counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pshare_jax.errors import PshareError
from pshare_jax.training.data.config import SourceConfig
from pshare_jax.training.data.records import MARKS, RecordReader, is_trained, json_field, messages_of
from pshare_jax.training.data.shapes import SHAPES, renamed

EVERY = "*"
"""In a source's `ignore`: all fields."""
_CHAT = ("tools", "chat_template_kwargs")
_MEANT = (*_CHAT, "functions", "documents", "system", "system_prompt", "images", "audios", "videos")
"""Fields beside messages that say what the model should read. Others, such as id, describe the record."""
_LINKS = ("tool_call_id",)
"""Fields of messages that say which messages belong together; templates tell it by their order."""
_Texts = list[tuple[str, str]]


class Unread(NamedTuple):
    """Names of fields: `lost` ones were meant for the model, `others` describe the record."""

    lost: list[str]
    others: list[str]


def unread_fields(
    content: Mapping[str, Any], record: Mapping[str, Any], source: SourceConfig, reader: RecordReader
) -> Unread:
    """The fields without effect of a usable record, as the file has it and as training reads it (`shaped`), without those that
    the source ignores. Fields of messages are named messages.NAME, template variables chat_template_kwargs.NAME.
    """
    if EVERY in source.ignore:
        return Unread([], [])
    lost, others = _beside(content, source, reader)
    if reader.reads_chats:
        lost += _without_effect(record, source.ignore, reader)
    else:
        lost += [f"messages.{name}" for name in _fields(messages_of(record))]
    return Unread(
        [name for name in lost if name not in source.ignore], [name for name in others if name not in source.ignore]
    )


def _beside(content: Mapping[str, Any], source: SourceConfig, reader: RecordReader) -> tuple[list[str], list[str]]:
    """Fields that neither the shape nor the chat reads, of the first and of the second kind."""
    given = {name: value for name, value in renamed(content, source.columns).items() if not _is_empty(value)}
    if source.shape is not None:
        shape = SHAPES[source.shape]
        read = {*shape.needs, *shape.maybe}
    else:
        read = {"messages"} if "messages" in given else {"prompt", "completion"}
        read |= {*_CHAT} if reader.reads_chats else set()
    unread = [str(name) for name in given if name not in read]
    return [name for name in unread if name in _MEANT], [name for name in unread if name not in _MEANT]


def _without_effect(record: Mapping[str, Any], ignore: Sequence[str], reader: RecordReader) -> list[str]:
    messages = messages_of(record)
    tools, kwargs = json_field(record, "tools", list), json_field(record, "chat_template_kwargs", dict) or {}
    turns = _Turns(messages, kwargs, reader)
    found = [
        f"chat_template_kwargs.{name}" for name in kwargs if not reader.tokenizer.reads_variable(name, reader.style)
    ]
    if tools and "tools" not in ignore and turns.same(messages, tools, None):
        found.append("tools")
    for name in _fields(messages):
        if f"messages.{name}" not in ignore and turns.same(_without(messages, name), tools, tools):
            found.append(f"messages.{name}")
    return found


class _Turns:
    """The texts of a conversation's trained turns."""

    def __init__(self, messages: list[dict[str, Any]], kwargs: Mapping[str, Any], reader: RecordReader) -> None:
        self._messages, self._kwargs, self._reader = messages, kwargs, reader
        answers = [index for index, message in enumerate(messages) if index and message["role"] == "assistant"]
        # The last turn shows most of a conversation, so a difference is found at once.
        self._trained = [index for index in reversed(answers) if is_trained(messages[index], index)]
        self._texts: dict[int, tuple[str, str] | None] = {}

    def same(self, messages: list[dict[str, Any]], tools: Any, other_tools: Any) -> bool:
        """Whether other messages and tools give the texts that these messages and `tools` give."""
        return all(self._text(messages, index, other_tools) == self._own_text(index, tools) for index in self._trained)

    def _own_text(self, index: int, tools: Any) -> tuple[str, str] | None:
        if index not in self._texts:
            self._texts[index] = self._text(self._messages, index, tools)
        return self._texts[index]

    def _text(self, messages: list[dict[str, Any]], index: int, tools: Any) -> tuple[str, str] | None:
        """None if the template refuses the turn, so that it needs what was removed."""
        chat = [{name: value for name, value in message.items() if name not in MARKS} for message in messages]
        options = {"tools": tools or None, "template_kwargs": self._kwargs, "style": self._reader.style}
        try:
            return self._reader.tokenizer.turn_text(chat[:index], chat[index], **options)
        except (PshareError, RecursionError):
            return None


def _fields(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields of messages beside the role and the text, each once."""
    return list(dict.fromkeys(name for message in messages for name in _removable(message)))


def _removable(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        is_link = name in _LINKS or (name == "name" and message["role"] in ("tool", "function"))
        if name not in ("role", "content", *MARKS) and not is_link and not _is_empty(value):
            yield name


def _without(messages: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    return [
        {field: value for field, value in message.items() if field != name or field not in _removable(message)}
        for message in messages
    ]


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
