"""The items of a response's output, and the stream events that tell of them, from the pieces of an answer."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pshare_jax.text.tool_calls import CallPiece, Piece

Data = dict[str, Any]
End = Literal["completed", "incomplete"]


class _Message:
    """A message item: one part with the text so far and the log-probabilities of its tokens."""

    def __init__(self, name: str, output_index: int):
        self.item: Data = {"id": f"msg_{name}", "type": "message", "status": "in_progress", "role": "assistant"}
        self.item["content"] = []
        self._place = {"output_index": output_index, "item_id": self.item["id"], "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[Data] = []

    def begin(self) -> Iterator[Data]:
        yield _item_event("added", self._place, self.item)
        yield {"type": "response.content_part.added", **self._place, "part": _text_part("", [])}

    def add(self, text: str, logprobs: list[Data]) -> Iterator[Data]:
        self._texts.append(text)
        self._logprobs += logprobs
        yield {"type": "response.output_text.delta", **self._place, "delta": text, "logprobs": logprobs}

    def finish(self, status: End) -> Iterator[Data]:
        text = "".join(self._texts)
        part = _text_part(text, self._logprobs)
        self.item = {**self.item, "status": status, "content": [part]}
        yield {"type": "response.output_text.done", **self._place, "text": text, "logprobs": self._logprobs}
        yield {"type": "response.content_part.done", **self._place, "part": part}
        yield _item_event("done", self._place, self.item)


class _Call:
    """A function_call item with the arguments so far."""

    def __init__(self, name: str, output_index: int, function: str):
        self.item: Data = {"id": f"fc_{name}", "type": "function_call", "status": "in_progress", "name": function}
        self.item |= {"call_id": f"call_{name}", "arguments": ""}
        self._place = {"output_index": output_index, "item_id": self.item["id"]}
        self._arguments: list[str] = []

    def begin(self) -> Iterator[Data]:
        yield _item_event("added", self._place, self.item)

    def add(self, arguments: str) -> Iterator[Data]:
        self._arguments.append(arguments)
        yield {"type": "response.function_call_arguments.delta", **self._place, "delta": arguments}

    def finish(self, status: End) -> Iterator[Data]:
        arguments, name = "".join(self._arguments), self.item["name"]
        self.item = {**self.item, "status": status, "arguments": arguments}
        yield {
            "type": "response.function_call_arguments.done",
            **self._place,
            "name": name,
            "arguments": arguments,
        }
        yield _item_event("done", self._place, self.item)


class Output:
    """The items so far; at most the last is open. Ids are made from `name`, which is unique."""

    def __init__(self, name: str):
        self._name = name
        self._items: list[_Message | _Call] = []
        self._open: _Message | _Call | None = None
        self._logprobs: list[Data] = []

    @property
    def items(self) -> list[Data]:
        """All items."""
        return [item.item for item in self._items]

    def add_logprobs(self, logprobs: Sequence[Data]) -> None:
        """Log-probabilities of tokens whose text comes in later pieces. Those of a call's tokens are not reported."""
        self._logprobs += logprobs

    def add(self, piece: Piece) -> Iterator[Data]:
        """Events of a piece, without sequence numbers."""
        if isinstance(piece, CallPiece):
            yield from self._add_to_call(piece)
        elif piece:
            yield from self._add_text(piece)

    def finish(self, status: End) -> Iterator[Data]:
        """Events of the end; the open item has this status, and an answer without text or calls is an empty message."""
        if not self._items or (isinstance(self._open, _Message) and self._logprobs):
            yield from self._add_text("")
        yield from self._close(status)

    def _add_text(self, text: str) -> Iterator[Data]:
        message = self._open
        if not isinstance(message, _Message):
            yield from self._close("completed")
            message = _Message(self._next_name, len(self._items))
            yield from self._begin(message)
        if text or self._logprobs:
            yield from message.add(text, self._logprobs)
        self._logprobs = []

    def _add_to_call(self, piece: CallPiece) -> Iterator[Data]:
        call = self._open
        if piece.name is not None:
            yield from self._close("completed")
            call = _Call(self._next_name, len(self._items), piece.name)
            yield from self._begin(call)
        assert isinstance(call, _Call)
        self._logprobs = []
        if piece.arguments:
            yield from call.add(piece.arguments)

    @property
    def _next_name(self) -> str:
        return f"{self._name}_{len(self._items)}"

    def _begin(self, item: _Message | _Call) -> Iterator[Data]:
        self._items.append(item)
        self._open = item
        yield from item.begin()

    def _close(self, status: End) -> Iterator[Data]:
        if self._open is not None:
            yield from self._open.finish(status)
        self._open = None


def _text_part(text: str, logprobs: list[Data]) -> Data:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _item_event(what: Literal["added", "done"], place: Data, item: Data) -> Data:
    return {"type": f"response.output_item.{what}", "output_index": place["output_index"], "item": item}
