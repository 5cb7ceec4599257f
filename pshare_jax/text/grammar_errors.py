"""llguidance's messages as sentences for a user. Host code without jax."""

import re

MAX_CHARS = 300
_KNOWN = (
    (r"Unimplemented keys: \[(?P<keys>[^\]]*)\]", "The schema has an unsupported keyword: {keys}."),
    (r"Unknown format: (?P<name>.*)", "The schema has an unsupported format: {name}."),
    (
        r"oneOf constraints are not supported",
        "The schema has an unsupported oneOf, whose options may overlap; use anyOf.",
    ),
    (
        r"Resource '(?P<uri>[^']*)' is not present",
        "The schema has an unsupported $ref or $schema, to {uri}; move what it refers to into $defs.",
    ),
    (
        r"regex parse error:\s+(?P<regex>[^\n]*)\n(?:[^\n]*\n)*?error: (?P<error>[^\n]*)",
        "The pattern or regex {regex} is unsupported: {error}.",
    ),
    (
        r"initial lexer configuration",
        "The grammar's patterns, numbers and texts are too complex together; simplify them.",
    ),
    (r"NoExtensionBias", "Nothing satisfies the grammar: it has no end."),
    (r"Unsatisfiable schema: (?P<reason>.*)", "Nothing satisfies the schema: {reason}."),
)

_LISTING = re.compile(r"failed to compile JSON schema: |\n +\d+ \|(?s:.*)")
"""What follows the message: the grammar's lines, with ours among them."""


def sentence(message: str) -> str:
    """One sentence that says what is wrong with a grammar."""
    message = message.replace("<non-verbose/>", "")
    for pattern, text in _KNOWN:
        if found := re.search(pattern, message):
            return short(text.format_map({name: plain(value) for name, value in found.groupdict().items()}))
    return short(f"The grammar cannot be used: {plain(_LISTING.sub('', message))}.")


def plain(text: str) -> str:
    """A message on one line, without its full stop."""
    return " ".join(text.replace('"', "").split()).rstrip(".")


def short(text: str) -> str:
    """The text, cut where it is too long for a message."""
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 4] + "...."
