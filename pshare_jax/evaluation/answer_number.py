"""The number that a text answers with, for the verifier `number`. Host code without jax.

It is the last number of the text, or of the last marked part, if there is one: what follows `####` on its line (GSM8K), or the
content of a LaTeX `\\boxed{}`.
"""

import re
from fractions import Fraction

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?!\w))?"
_NUMBER = re.compile(
    # A minus between two operands is none of the number's.
    r"(?P<sign>(?<![\w)\]}])[-\u2212]\s?)?(?:\\?[$\u20ac\u00a3]\s?)?(?P<inner>(?<!\w)-)?"
    r"(?:\\[dt]?frac\{(?P<latex_top>[0-9]+)\}\{(?P<latex_below>[0-9]+)\}"
    rf"|(?<!\w)(?<![0-9]\.)(?:(?P<whole>[0-9]+)\s(?=[0-9]+/[0-9]))?(?P<value>{_DECIMAL})(?:\s?/\s?(?P<below>{_DECIMAL}))?)",
    re.ASCII,
)
_MARK = re.compile(r"####(?P<line>[^\n]*)|\\(?:boxed|fbox)\s*\{")


def number_in(text: str) -> Fraction | None:
    """The number that the text answers with, exactly; None if it has none.

    Read are signs, thousands separated by commas, decimals, exponents, fractions (`3/4`, `1 3/4`, `\\frac{3}{4}`) and currency
    signs; a percent sign and a full stop after the number mean nothing.
    """
    value = None
    for match in _NUMBER.finditer(_answering(text)):
        value = _value(match)
    return value


def _answering(text: str) -> str:
    """The last marked part, or the whole text. A box that is not closed ends with the text."""
    marks = list(_MARK.finditer(text))
    if not marks:
        return text
    mark = marks[-1]
    if mark["line"] is not None:
        return mark["line"]
    depth, end = 1, mark.end()
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[mark.end() : end]


def _value(match: re.Match[str]) -> Fraction | None:
    """None for a division by zero, and for more digits than Python converts."""
    try:
        if match["latex_top"] is not None:
            value = Fraction(int(match["latex_top"]), int(match["latex_below"]))
        else:
            value = _decimal(match["value"]) / _decimal(match["below"] or "1") + int(match["whole"] or 0)
    except (ZeroDivisionError, ValueError):
        return None
    return -value if match["sign"] or match["inner"] else value


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
