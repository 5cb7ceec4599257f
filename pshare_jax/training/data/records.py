"""Samples from a record (`messages`, or `prompt` and `completion`); `prepare.py` calls it.

Prompts are encoded as in the server: chats by `Tokenizer.encode_chat`, texts by `Tokenizer.encode`. A faulty record
raises `Dropped` with the reason that the report counts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.chat_template import ROLES, checked_messages
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.samples import Limits, Sample, Turn, join_pair, join_turns

MARKS = ("train", "weight")
_EXCLUDED = "excluded by train or weight"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Dropped(Exception):
    """A record that cannot be trained on: the report counts `reason` and shows `detail`, one sentence."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class RecordReader:
    """Makes samples from records, with `pairs` samples of two answers. `stop_ids` end generation with the module; prompts are
    written in its `style`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        chat: bool,
        limits: Limits,
        style: ChatStyle | None = None,
        *,
        pairs: bool = False,
    ) -> None:
        self.tokenizer, self.reads_chats, self._limits, self._pairs = tokenizer, chat, limits, pairs
        self.style = style or ChatStyle()
        self._ends = stop_ids & tokenizer.special_ids

    def samples(self, record: Any, source: str, line: int) -> tuple[list[Sample], dict[str, int]]:
        """The record's samples (at least one), and the number of omitted turns by reason.

        Raises:
            Dropped: no turn of the record can be trained on.
        """
        if not isinstance(record, dict):
            raise Dropped("not an object", f"A record must be a JSON object, not {type(record).__name__}.")
        left_out: dict[str, int] = {}
        if self._pairs:
            samples, too_long = self._pair(record, left_out, source, line)
        else:
            samples, too_long = join_turns(self._turns(record, left_out), self._limits, source, line)
        if too_long:
            left_out["too long"] = too_long
        if not samples:
            reason = max(left_out, key=lambda name: left_out[name]) if left_out else "no assistant turn"
            raise Dropped(reason)
        self._check_ids(max(max(sample.ids + sample.rejected) for sample in samples))
        return samples, left_out

    def _turns(self, record: Mapping[str, Any], left_out: dict[str, int]) -> list[Turn]:
        return list(self._chat_turns(record, left_out) if self.reads_chats else self._text_turns(record, left_out))

    def _pair(
        self, record: Mapping[str, Any], left_out: dict[str, int], source: str, line: int
    ) -> tuple[list[Sample], int]:
        """The sample of a record's two answers, and how many are too long."""
        if record.get("rejected") is None:
            raise Dropped("no pair", "A pair needs two answers, chosen and rejected, to the same prompt.")
        other: dict[str, int] = {}
        found = self._turns(record, left_out), self._turns({**record, "completion": record["rejected"]}, other)
        if not all(found):
            left_out.update(other)
            return [], 0
        (chosen,), (rejected,) = found
        if chosen.prompt != rejected.prompt or chosen.answer == rejected.answer:
            raise Dropped("no pair", "The answers chosen and rejected must differ, and their prompts be the same.")
        sample = join_pair(chosen, rejected, self._limits, source, line)
        return ([], 1) if sample is None else ([sample], 0)

    def _check_ids(self, largest: int) -> None:
        """For an id without an embedding XLA would read the last row."""
        size = self._limits.vocab_size
        if size is not None and largest >= size:
            text = self.tokenizer.decode([largest], skip_special_tokens=False)
            raise Dropped(
                "token without an embedding",
                f"The tokenizer encodes {text!r} as token {largest}, but the model has tokens 0 to {size - 1}.",
            )

    def _text_turns(self, record: Mapping[str, Any], left_out: dict[str, int]) -> Iterator[Turn]:
        messages = messages_of(record)
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise Dropped(
                "more than a question",
                "Without chats a record is one user's message and its answer, but this has the roles "
                f"{', '.join(message['role'] for message in messages)}; set module.chat_template, such as plain.",
            )
        if not is_trained(messages[1], 1):
            left_out[_EXCLUDED] = 1
            return
        eos = self._eos()
        try:
            question, answer = (message.get("content", "") for message in checked_messages(messages))
            if not answer:
                raise Dropped("empty answer")
            prompt, completion = self.tokenizer.encode_completion(self.style.text(question), answer)
        except PshareError as error:
            raise Dropped("wrong text", str(error)) from None
        if not prompt:
            raise Dropped("empty prompt")
        yield Turn(prompt, [*completion, eos])

    def _chat_turns(self, record: Mapping[str, Any], left_out: dict[str, int]) -> Iterator[Turn]:
        messages = messages_of(record)
        tools, kwargs = json_field(record, "tools", list), json_field(record, "chat_template_kwargs", dict)
        chat = [{key: value for key, value in message.items() if key not in MARKS} for message in messages]
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise Dropped("no assistant turn")
        for index in answers:
            if not is_trained(messages[index], index):
                reason = _EXCLUDED
            elif index == 0:
                reason = "no message before the answer"
            elif turn := self._turn(chat, index, tools or None, kwargs):
                yield turn
                continue
            else:
                reason = "empty answer"
            left_out[reason] = left_out.get(reason, 0) + 1

    def _turn(self, chat: list[dict[str, Any]], index: int, tools: Any, kwargs: Any) -> Turn | None:
        """The turn of message `index`, None if its answer is empty."""
        if _is_empty(chat[index]):
            return None
        try:
            prompt, tail = self.tokenizer.encode_turn(
                chat[:index], chat[index], tools=tools, template_kwargs=kwargs, style=self.style
            )
        except (PshareError, RecursionError) as error:
            raise Dropped("refused by the chat template", str(error)) from None
        answer = self._ended(tail)
        return Turn(prompt, answer) if prompt and len(answer) > 1 else None

    def _ended(self, tail: list[int]) -> list[int]:
        """`tail` up to its end-of-turn token: the first stop id; for templates without a stop id, the closing control
        token, or else the whole text and eos.
        """
        for index, token in enumerate(tail):
            if token in self._ends:
                return tail[: index + 1]
        controls = [index for index, token in enumerate(tail) if token in self.tokenizer.special_ids]
        if controls and not self.tokenizer.decode(tail[controls[-1] + 1 :]).strip():
            return tail[: controls[-1] + 1]
        return [*tail, self._eos()]

    def _eos(self) -> int:
        if self.tokenizer.eos_id is None:
            raise PshareError("The tokenizer needs an eos token to end answers; set eos_token in its config.")
        return self.tokenizer.eos_id


def messages_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The record's conversation, with valid roles; a faulty one is `Dropped`."""
    if record.get("messages") is not None:
        messages = json_field(record, "messages", list)
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = [*_as_messages(record, "prompt", "user"), *_as_messages(record, "completion", "assistant")]
    else:
        raise Dropped("no messages", "A record must have messages, or prompt and completion.")
    if not messages:
        raise Dropped("no messages", "messages must not be empty.")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Dropped("wrong type", f"Message {index} must be an object with role and content.")
        role = message.get("role")
        if role is None:
            raise Dropped("no role", f"Message {index} has no role.")
        if role not in ROLES:
            raise Dropped(
                "unknown role",
                f"Message {index} has the role {role!r}; allowed are {', '.join(ROLES)}, and names such as human and gpt with "
                "shape: sharegpt, columns: {conversations: messages} in the source.",
            )
    return messages


def _as_messages(record: Mapping[str, Any], field: str, role: str) -> list[Any]:
    value = record[field]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise Dropped("wrong type", f"{field} must be a string or a list of messages, not {type(value).__name__}.")
    if field == "completion" and [isinstance(m, dict) and m.get("role") for m in value] != ["assistant"]:
        raise Dropped("wrong type", "A completion given as messages must be one assistant message.")
    if field == "prompt":
        # Only the completion is trained, not assistant messages of the prompt.
        return [{**m, "train": False} if isinstance(m, dict) else m for m in value]
    return value


def json_field(record: Mapping[str, Any], field: str, kind: type) -> Any:
    """A field such as `tools` or `messages`, which table formats store as JSON text."""
    value = record.get(field)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise Dropped("wrong type", f"{field} is a string but not valid JSON.") from None
    if value is not None and not isinstance(value, kind):
        raise Dropped("wrong type", f"{field} must be a {kind.__name__}, not {type(value).__name__}.")
    return value


def is_trained(message: Mapping[str, Any], index: int) -> bool:
    """Whether an assistant's message is a target; `Dropped` if its marks are not valid."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise Dropped("wrong type", f"Message {index}: train must be true or false, not {train!r}.")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise Dropped("wrong type", f"Message {index}: weight must be 0 or 1, not {weight!r}.")
    return train is not False and weight != 0


def _is_empty(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    parts: Sequence[Any] = content if isinstance(content, list) else [content]
    texts = [part.get("text") or part.get("refusal") if isinstance(part, dict) else part for part in parts]
    said = any(not isinstance(text, str) or text.strip() for text in texts if text is not None)
    return not said and not any(message.get(key) for key in ("tool_calls", "function_call", *_REASONING))
