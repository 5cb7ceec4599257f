"""Keeps text that a client sent from becoming control tokens of the prompt.

A template cannot tell its own `<|im_end|>` from one inside a message. Before rendering, `Tokenizer.encode_chat` replaces
characters of control text inside messages by private-use placeholders (`masked`); a second rendering, of messages without
any control character (`disguised`), shows which control tokens the template writes on its own. `PlainEncoder` then encodes
the rendering with control tokens at exactly these places.
"""

import json
import re
import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from pshare_jax.text.chat_template import ROLES, map_strings
from pshare_jax.text.native import encode_ids, encode_offsets

# Private-use planes 15 and 16: in no control token, unchanged by normalisers, rare in real text.
_PRIVATE_USE = range(0xF0000, 0x10FFFD)

KEPT_BYTES = 32 << 20
"""Memory of what a `PieceEncoder` keeps: the last few million characters."""
_ENTRY_BYTES = 200

# Field names and values of the chat format that templates branch on; disguising them would only change the branch.
_FORMAT_WORDS = frozenset(
    (
        *ROLES,
        *("role", "content", "name", "type", "id", "tool_calls", "tool_call_id", "function", "arguments"),
        *("reasoning_content", "thinking", "reasoning", "parameters", "properties", "required", "description"),
        *("text", "object", "array", "string", "number", "integer", "boolean", "null"),
    )
)


class ControlText:
    """The texts of one tokenizer's control tokens."""

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = [text for text in texts if text.strip()]
        self._alphabet = sorted(set("".join(self._texts)) - set(" \t\r\n"))
        alternatives = "|".join(re.escape(text) for text in self._texts)
        # A lookahead finds overlapping occurrences too; group 2 is the character that is replaced.
        self._pattern = re.compile(rf"(?={alternatives})(\s*)(\S)") if self._texts else re.compile(r"(?!)")

    def inside(self, value: Any) -> bool:
        """Whether any string in `value` (plain data) contains a control token's text."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, dict):
            return any(self.inside(key) or self.inside(item) for key, item in value.items())
        return isinstance(value, list) and any(self.inside(item) for item in value)

    def placeholders(self, *taken: Any) -> "Placeholders":
        """Placeholders for all control characters; none of them occurs in `taken` (plain data)."""
        used = set(json.dumps(taken, ensure_ascii=False))
        free = islice((char for char in map(chr, _PRIVATE_USE) if char not in used), len(self._alphabet))
        return Placeholders(dict(zip(self._alphabet, free, strict=True)), self._pattern, self._texts)


class Placeholders:
    """One request's mapping from control characters to private-use characters, one to one: lengths stay the same."""

    def __init__(self, placeholder_of: dict[str, str], pattern: re.Pattern[str], texts: list[str]) -> None:
        self._placeholder_of, self._pattern, self._texts = placeholder_of, pattern, texts
        self._disguise = str.maketrans(placeholder_of)
        self._restore = str.maketrans({placeholder: char for char, placeholder in placeholder_of.items()})

    def masked(self, value: Any) -> Any:
        """`value` (plain data) with one character of each control text replaced."""
        return map_strings(value, lambda text: self._pattern.sub(lambda at: at[1] + self._placeholder_of[at[2]], text))

    def disguised(self, value: Any, known: Collection[str]) -> Any:
        """`value` without any control character, so that nothing in it can become part of a control token.

        Words that the template itself mentions (`known`) stay, unless they contain a control token or are part of one: a
        template that writes `'<' + tag + '>'` must not complete a control token from them.
        """
        return map_strings(value, lambda text: text if self._stays(text, known) else text.translate(self._disguise))

    def restored(self, text: str) -> str:
        """`text` with every placeholder replaced by its original character."""
        return text.translate(self._restore)

    def _stays(self, text: str, known: Collection[str]) -> bool:
        if text in _FORMAT_WORDS:
            return True
        return text in known and not any(text in control or control in text for control in self._texts)


class PlainEncoder:
    """Encodes control text as ordinary text, and control tokens only where the caller says.

    It is the tokenizer's own pipeline with every special token renamed, so one native pass keeps all its whitespace rules.
    """

    def __init__(self, backend: Backend, special: Mapping[int, str], secret: str) -> None:
        """`special`: id -> text of the control tokens; `secret`: random, so that no prompt contains a new name."""
        self._name_of = {index: f"\U00100000{secret}.{index}\U00100001" for index in special}
        names = {text: self._name_of[index] for index, text in special.items()}
        self._backend = Backend.from_str(json.dumps(_renamed(json.loads(backend.to_str()), names)))
        self._id_of = {self._backend.token_to_id(name): index for index, name in self._name_of.items()}

    def encode(
        self, text: str, control: Sequence[tuple[int, int, int]] = (), restore: Callable[[str], str] = str
    ) -> list[int]:
        """Ids of `text`; `control`: (start, end, id) of its control tokens, all other text goes through `restore`."""
        pieces, at = [], 0
        for start, end, index in control:
            pieces += [restore(text[at:start]), self._name_of[index]]
            at = end
        ids = encode_ids(self._backend, "".join([*pieces, restore(text[at:])]))
        return [self._id_of.get(index, index) for index in ids]


class ControlFinder:
    """Finds the control tokens of texts by the tokenizer's own rules, much faster than the full tokenizer.

    A text that goes on as the one before did is searched from there.
    """

    def __init__(self, backend: Backend) -> None:
        """`backend` finds added tokens (`finding`)."""
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._ids = frozenset(added)
        self._fixed = frozenset(index for index, token in added.items() if _cuts(token))
        self._longest = max((len(token.content) for token in added.values()), default=0)
        self._before: tuple[str, list[tuple[int, int]]] = ("", [])

    def find(self, text: str) -> list[tuple[int, int]]:
        """Start and id of each added token in valid Unicode, in order."""
        kept = self._known(text)
        at = kept.pop()[0] if kept else 0
        encoding = encode_offsets(self._backend, text[at:])
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        found = kept + [(at + start, index) for index, (start, _) in spans if index in self._ids]
        self._before = text, found
        return found

    def _known(self, text: str) -> list[tuple[int, int]]:
        """Tokens that `text` shares with the text before; the search may begin at the last one."""
        before, found = self._before
        # Up to there no other token can be found, whatever follows.
        ends = (count for count in range(len(found), 0, -1) if found[count - 1][1] in self._fixed)
        known = next((count for count in ends if found[count - 1][0] + self._longest <= len(before)), 0)
        shared = bool(known) and text.startswith(before[: found[known - 1][0] + self._longest])
        return found[:known] if shared else []

    def pieces(self, text: str) -> Iterator[str]:
        """What is before the first control token, then each piece with the token at its start."""
        starts = [start for start, index in self.find(text) if index in self._fixed]
        yield from (text[start:end] for start, end in pairwise([0, *starts, len(text)]))


class PieceEncoder:
    """Encodes a text by its pieces, each from one control token to the next, and keeps the ids of recent pieces.

    The library finds added tokens before anything else and encodes what lies between two of them alone, so the ids are those of
    the whole text. Of a conversation that has grown only the new messages are encoded.
    """

    def __init__(self, backend: Backend, finder: ControlFinder, keep: int = KEPT_BYTES) -> None:
        """`finder` is of this encoder alone, since it goes on from the last text."""
        self._backend, self._finder, self._keep = backend, finder, keep
        self._ids: OrderedDict[str, array[int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """The ids of valid Unicode, without added special tokens."""
        first, *others = self._finder.pieces(text)
        ids = encode_ids(self._backend, first)
        for piece in others:
            ids.extend(self._ids_of(piece))
        return ids

    def _ids_of(self, piece: str) -> Sequence[int]:
        with self._lock:
            if piece in self._ids:
                self._ids.move_to_end(piece)
                return self._ids[piece]
        ids = array("I", encode_ids(self._backend, piece))
        with self._lock:
            if piece not in self._ids:
                self._ids[piece] = ids
                self._bytes += _kept_bytes(piece, ids)
            while self._bytes > self._keep:
                self._bytes -= _kept_bytes(*self._ids.popitem(last=False))
        return ids


def _kept_bytes(piece: str, ids: Sequence[int]) -> int:
    return sys.getsizeof(piece) + sys.getsizeof(ids) + _ENTRY_BYTES


def _cuts(token: AddedToken) -> bool:
    """Whether a text may be cut before the token: normalising what is beside it does not change it, and a token before it that
    must stand alone as a word does so with and without it.
    """
    first = token.content[0]
    return token.special and not (token.normalized or first.isalnum() or first == "_")


def finding(backend: Backend) -> Backend:
    """`backend` for added tokens alone: the same rules find them, all text between two of them is one unknown token."""
    state = json.loads(backend.to_str())
    vocab = {token["content"]: token["id"] for token in state["added_tokens"]}
    unknown = "\U00100000unknown\U00100001"
    vocab[unknown] = max(vocab.values(), default=-1) + 1
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}
    return Backend.from_str(json.dumps({**state, "model": model, "pre_tokenizer": None, "post_processor": None}))


def _renamed(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json with every text of `names` renamed, and without the merges that could still build one."""
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): index for text, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        hidden = names.keys()
        model["merges"] = [pair for pair in model["merges"] if not hidden & {pair[0], pair[1], pair[0] + pair[1]}]
    return {**state, "post_processor": None}
