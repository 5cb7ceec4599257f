"""The tokenizer's twin that knows no control text: `<|im_end|>` in a text is nothing but characters.

Owned by `Tokenizer` (chats that quote control text, prompts with control text switched off). It is the same pipeline
with every special token under a secret name, so one native pass keeps all rules about blanks and prefixes, and control
tokens appear only where the caller says.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer as Backend


class PlainEncoder:
    """Encodes text with control tokens at given places only."""

    def __init__(self, backend: Backend, special: Mapping[int, str], secret: str) -> None:
        """`special`: id -> text of the control tokens; `secret`: a text that nobody can have put into a prompt."""
        self._name_of = {index: f"\U00100000{secret}.{index}\U00100001" for index in special}
        names = {text: self._name_of[index] for index, text in special.items()}
        self._backend = Backend.from_str(json.dumps(_renamed(json.loads(backend.to_str()), names)))
        self._id_of = {self._backend.token_to_id(name): index for index, name in self._name_of.items()}

    def encode(
        self,
        text: str,
        control: Sequence[tuple[int, int, int]] = (),
        restore: Callable[[str], str] = str,
    ) -> list[int]:
        """Ids of `text`; `control`: (start, end, id) of its control tokens, all other text goes through `restore`."""
        pieces, at = [], 0
        for start, end, index in control:
            pieces += [restore(text[at:start]), self._name_of[index]]
            at = end
        ids = self._backend.encode("".join([*pieces, restore(text[at:])]), add_special_tokens=False).ids
        return [self._id_of.get(index, index) for index in ids]


def control_finder(backend: Backend) -> Backend:
    """`backend` for control tokens only: the same rules find them, and any text between them is one unknown token.

    Much faster where nothing but the control tokens of a text is asked for.
    """
    state = json.loads(backend.to_str())
    vocab = {token["content"]: token["id"] for token in state["added_tokens"]}
    unknown = "\U00100000unknown\U00100001"
    vocab[unknown] = max(vocab.values(), default=-1) + 1
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}
    return Backend.from_str(json.dumps({**state, "model": model, "pre_tokenizer": None, "post_processor": None}))


def _renamed(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A tokenizer.json with every text of `names` under its new name, and no merge that could still build one."""
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
        kept = [pair for pair in model["merges"] if not hidden & {pair[0], pair[1], pair[0] + pair[1]}]
        model["merges"] = kept
    return {**state, "post_processor": None}
