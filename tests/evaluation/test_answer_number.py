"""The number that a text answers with, in the notations of people and of the data sets, and verifiers that compare texts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pshare_jax.errors import PshareError
from pshare_jax.evaluation.answer_number import number_in
from pshare_jax.evaluation.verifiers import regex_verifier, same_number

pytestmark = pytest.mark.host

WRITTEN = [
    ("42", 42),
    ("The result is 42.", 42),
    ("3.5.", "7/2"),
    (".5", "1/2"),
    ("1,234", 1234),
    ("$1,234.50.", "2469/2"),
    ("100,000,000 people", 100_000_000),
    ("1,2345", 2345),
    ("1, 2 and 3", 3),
    ("1,2", 2),
    ("-$5", -5),
    ("$-5", -5),
    ("\u22124", -4),
    ("x = -3", -3),
    ("10 - 3 = 7", 7),
    ("5-3", 3),
    ("50%", 50),
    (r"50\%", 50),
    (r"\$5", 5),
    ("3/4", "3/4"),
    ("7 / 2", "7/2"),
    ("1 3/4", "7/4"),
    ("-3/4", "-3/4"),
    (r"\frac{1}{2}", "1/2"),
    (r"-\dfrac{1}{2}", "-1/2"),
    ("1.5e3", 1500),
    ("12km", 12),
    ("**18**", 18),
    ("so...5", 5),
    ("1/0", None),
    ("abc123", None),
    ("9" * 5000, None),
    ("", None),
    ("none", None),
]
MARKED = [
    ("first 5\n#### 42", 42),
    ("#### -1,000 dollars\nso 7", -1000),
    (r"\boxed{12} for 5", 12),
    (r"\boxed{\frac{3}{4}} of 8", "3/4"),
    (r"\boxed{x = 3", 3),
    (r"\boxed{1}, no: \boxed{2}.", 2),
    ("#### none\n5", None),
]


def value(written: int | str | None) -> Fraction | None:
    return None if written is None else Fraction(written)


@pytest.mark.parametrize(("text", "expected"), WRITTEN, ids=lambda x: repr(x)[:20])
def test_notations(text, expected):
    assert number_in(text) == value(expected)
    if expected is not None:
        assert number_in(f"Of 17 things, it is {text}") == value(expected)


@pytest.mark.parametrize(("text", "expected"), MARKED, ids=lambda x: repr(x)[:20])
def test_a_marked_number_counts_and_no_other(text, expected):
    assert number_in(text) == value(expected)


@given(
    st.integers(-(10**12), 10**12), st.integers(1, 10**4), st.sampled_from(["{}", "is {}.", "({})", "${}", "a = {}, b"])
)
def test_any_number_is_found_as_it_is_written(number, divisor, text):
    assert number_in(text.format(f"{number:,}")) == number
    assert number_in(text.format(f"{number / 16:.4f}")) == Fraction(number, 16)
    assert number_in(text.format(f"{number}/{divisor}")) == Fraction(number, divisor)


@given(st.text(alphabet="0123456789,./-+$%e \\{}frackboxed#\n", max_size=200))
def test_no_text_is_an_error(text):
    assert number_in(text) is None or isinstance(number_in(text), Fraction)


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        ("She has 18 eggs.", "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", 1),
        ("It costs $1,000.00", "#### 1000", 1),
        ("0.5", r"\boxed{\frac{1}{2}}", 1),
        ("17", "#### 18", 0),
        ("no number", "18", 0),
        ("18", "no number", 0),
    ],
)
def test_the_same_number(answer, expected, score):
    assert same_number(answer, {"answer": expected}) == score


@pytest.mark.parametrize(
    ("pattern", "answer", "expected", "score"),
    [
        (r"answer is \(?([A-D])\b", "The answer is (B).", "B", 1),
        (r"answer is \(?([A-D])\b", "The answer is (B).", "the answer is B", 1),
        (r"answer is \(?([A-D])\b", "The answer is A. No, the answer is C.", "C", 1),
        (r"answer is \(?([A-D])\b", "B", "B", 0),
        (r"\b[A-D]\b", "Either A or D", "D", 1),
        (r"(?i)yes|no", "Yes, no", "no", 1),
    ],
)
def test_what_a_pattern_finds(pattern, answer, expected, score):
    assert regex_verifier(pattern)(answer, {"answer": expected}) == score


def test_a_pattern_that_is_none():
    with pytest.raises(PshareError, match=r"'\(' is not a regular expression"):
        regex_verifier("(")
