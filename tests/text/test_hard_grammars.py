"""Grammars and schemas that strain the library: none ends or stops the process, and none is obeyed only in part."""

import json
import subprocess
import sys

import pytest
from tiny_tokenizer import write_tokenizer

from pshare_jax.errors import PshareError
from pshare_jax.text import schema_checks
from pshare_jax.text.grammar import BadGrammar, Grammar, GrammarCompiler
from pshare_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "qwen3", vocab_size=320)
    return GrammarCompiler(Tokenizer.from_folder(folder), 320)


def chain(link, last):
    """Links, each to the next: more than a usual stack has room for."""
    return [*(link(number, number + 1) for number in range(3000)), last(3000)]


def long_chains():
    """Grammars with rules, terminals or references that lead through all others."""
    yield "\n".join(["start: r0", *chain(lambda one, two: f"r{one}: r{two}", lambda one: f'r{one}: "x"')])
    yield "\n".join(["start: R0", *chain(lambda one, two: f"R{one}: ~(R{two})", lambda one: f'R{one}: "x"')])
    for form in ('{{"$ref": "#/$defs/{}"}}', '{{"type": "array", "items": {{"$ref": "#/$defs/{}"}}}}'):
        parts = chain(
            lambda one, two, form=form: f'"{one}": {form.format(two)}', lambda one: f'"{one}": {{"type": "null"}}'
        )
        yield Grammar.of_schema(json.loads('{"$ref": "#/$defs/0", "$defs": {' + ", ".join(parts) + "}}")).text


@pytest.mark.parametrize("number", range(4))
def test_a_chain_of_rules_does_not_end_the_process(tmp_path, number):
    write_tokenizer(tmp_path, "qwen3", vocab_size=320)
    (tmp_path / "grammar").write_text(list(long_chains())[number])
    code = f"""
from pathlib import Path
from pshare_jax.errors import PshareError
from pshare_jax.text.grammar import BadGrammar, Grammar, GrammarCompiler
from pshare_jax.text.tokenizer import Tokenizer
grammar = Grammar.of_text if {number} < 2 else Grammar
compiler = GrammarCompiler(Tokenizer.from_folder(Path({str(tmp_path)!r})), 320)
try:
    compiler.matcher(grammar((Path({str(tmp_path)!r}) / "grammar").read_text()), [319])
except PshareError as error:
    print(error)
print("done")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout[-5:]) == (0, "done\n"), run.stderr


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 999_983},
        {"type": "number", "multipleOf": 10.00003},
        {"allOf": [{"multipleOf": 997}, {"type": "integer", "multipleOf": 991}]},
        {"type": "array", "items": {"anyOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}},
    ],
)
def test_multiples_that_would_take_minutes_are_refused(schema):
    with pytest.raises(PshareError, match="unsupported keyword: multipleOf"):
        Grammar.of_schema(schema)


def test_optional_properties_whose_square_would_take_minutes_are_refused(compiler):
    listed = {f"p{index}": {} for index in range(schema_checks.MAX_OPTIONAL + 1)}
    with pytest.raises(PshareError, match="501 properties that are not required; at most 500 are allowed"):
        Grammar.of_schema({"type": "object", "properties": listed})
    parts = [{"type": "object", "properties": dict(list(listed.items())[half::2])} for half in (0, 1)]
    with pytest.raises(PshareError, match="501 properties"):
        Grammar.of_schema({"anyOf": parts})
    compiler.check(Grammar.of_schema({"type": "object", "properties": listed, "required": ["p0"]}))


def test_terminals_that_would_take_long_to_compile_are_refused(compiler):
    numbers = {f"p{index}": {"type": "number", "minimum": index + 0.123456} for index in range(2000)}
    with pytest.raises(BadGrammar, match=r"^The grammar's patterns, numbers and texts are too complex together"):
        compiler.check(Grammar.of_schema({"type": "object", "properties": numbers, "required": [*numbers]}))


@pytest.mark.parametrize("multiple", [0.01, 1e-6, 7, 100_000, 0.5, 9_973, 60])
def test_usual_multiples_compile(compiler, multiple):
    compiler.check(Grammar.of_schema({"type": "number", "multipleOf": multiple}))


@pytest.mark.parametrize("word", ["const", "enum"])
@pytest.mark.parametrize(
    "value", ["a\0b", "\x7f", {"a": ["\x1f"]}, -(2**63), 1234567890123456789, 1e300, [2**53 + 2]], ids=repr
)
def test_values_that_would_be_written_as_others_are_refused(word, value):
    value = [value, 1] if word == "enum" else value
    with pytest.raises(PshareError, match=f"unsupported {word}"):
        Grammar.of_schema({"type": "object", "properties": {"x": {word: value}}})


@pytest.mark.parametrize("value", ['\b\f\n\r\t"\\/\u2028é🎈', 2**53, -(2**53), 0.1, {"ключ\x01": None}], ids=repr)
def test_other_values_are_written_as_they_are(compiler, value):
    grammar = Grammar.of_schema({"const": value})
    matcher = compiler.matcher(grammar)
    one = {compiler._tokenizer.token_bytes(index): index for index in range(300)}
    for byte in json.dumps(value, ensure_ascii=False).encode():
        matcher.push(one[bytes([byte])])
    assert matcher.finished


def test_a_schema_that_is_too_long_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(schema_checks, "_check", lambda node: pytest.fail("was read"))
    with pytest.raises(PshareError, match="at most 200000"):
        Grammar.of_schema({"anyOf": [{}] * 100_000})


def test_parts_that_are_combined_are_found_once():
    def steps(num):
        num_steps = 0

        def count(*_):
            nonlocal num_steps
            num_steps += 1

        schema = {"anyOf": [{"type": "null"} for _ in range(num)]}
        sys.setprofile(count)
        schema_checks.closed(schema)
        sys.setprofile(None)
        return num_steps

    assert steps(400) <= 15 * steps(40)


def test_lark_and_gbnf_are_told_apart(compiler):
    compiler.check(Grammar.of_text('?start: x\n?x: "a"'))
    with pytest.raises(PshareError, match="not GBNF: Rule 'start' already exists"):
        Grammar.of_text('root ::= start\nstart ::= "a"')
