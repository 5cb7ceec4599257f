"""When a training record and a test question count as overlapping: the same user message, or a function of the same name.

Texts are compared without case, white space and punctuation, names also without word boundaries. BFCL sources leave out
by this what a test asks (`bfcl.py`), preparation counts by it what leaked, and experiments draw unseen questions by it.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# Between numbers these are operators: 3 - 2 is another question than 3 * 2.
_OPERATOR = re.compile(r"[-*/%](?=\s*[\d(])")
_MARK = re.compile(r"[\W_]")


class Asked(NamedTuple):
    """What records ask: digests of their user messages, of the last of them, and of their functions' names.

    Training answers all messages, a test asks the last. Digests of a large data set fit in memory, unlike its texts.
    """

    messages: frozenset[bytes]
    last: frozenset[bytes]
    functions: frozenset[bytes]

    def answers(self, test: "Asked") -> bool:
        """Whether training on these records teaches a question of `test`, or a function of it."""
        return bool(self.messages & test.last or self.functions & test.functions)


def asked(record: Mapping[str, Any]) -> Asked:
    """What a record asks: `messages`, or `prompt` and `completion`; maybe `tools`."""
    messages = _listed(record.get("messages"))
    if not messages:
        prompt = record.get("prompt")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _listed(prompt)
    texts = [normalised(_text(message.get("content"))) for message in messages if message.get("role") == "user"]
    tools = [tool.get("function", tool) for tool in _listed(record.get("tools"))]
    names = [tool.get("name") for tool in tools if isinstance(tool, Mapping)]
    functions = [normalised(name).replace(" ", "") for name in names if isinstance(name, str)]
    return Asked(_digests(texts), _digests(texts[-1:]), _digests(functions))


def joined(records: Iterable[Asked]) -> Asked:
    """What all of the records ask."""
    parts = list(records)
    return Asked(*(frozenset().union(*(part[at] for part in parts)) for at in range(len(Asked._fields))))


def _digests(texts: Iterable[str]) -> frozenset[bytes]:
    return frozenset(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)


def normalised(text: str) -> str:
    """`text` without case, and with single spaces for white space and punctuation; operators before a number stay."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    operators = {match.start() for match in _OPERATOR.finditer(plain)}
    folded = _MARK.sub(lambda mark: mark[0] if mark.start() in operators or _is_symbol(mark[0]) else " ", plain)
    # A text of punctuation alone is compared as it is.
    return " ".join(folded.split()) or plain


def _is_symbol(character: str) -> bool:
    """Not white space or punctuation: +, =, an emoji, an accent."""
    return unicodedata.category(character)[0] not in "PZC"


def _listed(value: Any) -> list[Mapping[str, Any]]:
    """A field's objects; table formats store it as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in _listed(content) if isinstance(part.get("text"), str))
