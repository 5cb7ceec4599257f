"""Grammars: random answers under random schemas validate; what cannot be obeyed is refused by name; stop ids and limits."""

import json
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from random_schemas import Schemas, random_answer
from tiny_tokenizer import write_tokenizer

from pshare_jax.errors import PshareError
from pshare_jax.sampling.params import all_allowed
from pshare_jax.text import grammar as module
from pshare_jax.text.grammar import BadGrammar, Grammar, GrammarCompiler, GrammarFailed
from pshare_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.host
VOCAB = 333
"""More than the tokenizers have, as in models whose vocabulary is padded."""
FAMILIES = ("qwen3", "gemma3")
"""Byte-level, and with byte tokens beside whole pieces."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        write_tokenizer(tmp_path_factory.mktemp(family), family, vocab_size=320)
        made[family] = World(tmp_path_factory.getbasetemp() / f"{family}0")
    return made


@pytest.fixture(scope="module")
def world(worlds):
    return worlds["qwen3"]


class World:
    def __init__(self, folder):
        self.tokenizer = Tokenizer.from_folder(folder)
        self.compiler = GrammarCompiler(self.tokenizer, VOCAB)
        plain = [i for i in range(self.tokenizer.vocab_size) if i not in self.tokenizer.special_ids]
        self.bytes = {i: self.tokenizer.token_bytes(i) for i in plain}
        self.id_of = {value: i for i, value in self.bytes.items() if len(value) == 1}
        # Without them, random texts would hardly ever end.
        self.likely = [self.id_of[bytes([char])] for char in b'"}]']

    def ids(self, text):
        return [self.id_of[bytes([byte])] for byte in text.encode()]

    def allows(self, grammar, text):
        """Whether the text may be a beginning, and whether it may be all."""
        matcher = self.compiler.matcher(grammar, [VOCAB - 1])
        try:
            for token in self.ids(text):
                matcher.push(token)
        except GrammarFailed:
            return None
        return "whole" if allowed(matcher)[-1] else "begun"

    def answers(self, grammar, seed, count=3, most=300):
        """Texts of finished random answers, with and without an end token; all must be whole characters."""
        texts = []
        for number in range(count):
            stops = self.tokenizer.eos_ids if number else frozenset()
            rng = np.random.default_rng((seed, number))
            matcher = self.compiler.matcher(grammar, stops)
            ids, finished = random_answer(matcher, VOCAB, stops, self.likely, rng, most)
            if finished:
                text = b"".join(self.bytes[token] for token in ids).decode()
                assert self.tokenizer.decode(ids) == text
                texts.append(text)
        return texts


def allowed(matcher, size=VOCAB):
    mask = all_allowed(1, size)
    matcher.fill(mask[0])
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:size].astype(bool)


# --- JSON schemas --------------------------------------------------------------------------------------------------------


def check_random_schemas(world, seeds):
    num_refused = num_finished = 0
    for seed in seeds:
        schema = Schemas(seed).document()
        try:
            grammar = Grammar.of_schema(schema)
            world.compiler.check(grammar)
        except PshareError:
            num_refused += 1
            continue
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        for text in world.answers(grammar, seed):
            validator.validate(json.loads(text))
            num_finished += 1
    assert num_refused < len(seeds) / 4
    assert num_finished > 2 * len(seeds)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_answers_under_random_schemas_validate(worlds, family):
    check_random_schemas(worlds[family], range(40))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_random_answers_under_500_random_schemas_validate(worlds, family):
    check_random_schemas(worlds[family], range(1000, 1500))


MATCHES = [
    # One form: a line, at most one blank behind a comma or colon.
    ({}, '{"a": 1, "b": [1,2]}', "whole"),
    ({}, '{"a":  1', None),
    ({}, '{"a": 1 ', None),
    ({}, "{ ", None),
    ({}, "[1, 2", "begun"),
    ({"type": "integer"}, "12", "whole"),
    (True, "null", "whole"),
    # A listed name in any other spelling would escape its schema.
    ({"properties": {"a": {"type": "integer"}}, "type": "object"}, '{"a":1', "begun"),
    ({"properties": {"a": {"type": "integer"}}, "type": "object"}, '{"a":"', None),
    ({"properties": {"a": {"type": "integer"}}, "type": "object"}, '{"\\u0061', None),
    ({"properties": {"a/b": {"type": "integer"}}, "type": "object"}, '{"a\\/b', None),
    # A listed name is written once, in the schema's order.
    ({"properties": {"a": {}, "b": {}}, "type": "object"}, '{"a":1,"a":', None),
    ({"properties": {"a": {}, "b": {}}, "type": "object"}, '{"b":1,"a":', None),
    ({"required": ["x"], "minProperties": 2, "type": "object"}, '{"x":1,"x":', None),
]


@pytest.mark.parametrize(("schema", "text", "expected"), MATCHES)
def test_the_form_of_json(world, schema, text, expected):
    assert world.allows(Grammar.of_schema(schema), text) == expected


KEYWORDS = {
    "not": {},
    "if": True,
    "uniqueItems": True,
    "contains": {},
    "minContains": 1,
    "propertyNames": {},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "$dynamicRef": "#a",
    "x-guidance": {},
    "$ref": "https://example.com/schema",
    "minProperties": 2,
}
AROUND = [
    lambda part: part,
    lambda part: {"type": "object", "properties": {"x": part}},
    lambda part: {"$defs": {"x": part}, "type": "array", "items": {"$ref": "#/$defs/x"}},
    lambda part: {"anyOf": [{"type": "string"}, {"prefixItems": [part]}]},
    lambda part: {"allOf": [{"type": "object", "additionalProperties": part}]},
    lambda part: {"patternProperties": {"^x": part}},
]


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_that_cannot_be_obeyed_is_named(world, keyword, around):
    with pytest.raises(PshareError) as caught:
        world.compiler.check(Grammar.of_schema(around({keyword: KEYWORDS[keyword]})))
    assert keyword in str(caught.value)
    assert "\n" not in str(caught.value)
    # As a property's name or a value it is none.
    world.compiler.check(Grammar.of_schema({"properties": {keyword: {"const": keyword}}, "default": {keyword: 1}}))


def test_annotations_and_unknown_keywords_change_nothing(world):
    schema = {"type": "boolean", "title": "t", "description": "d", "default": 1, "examples": [2], "nullable": True}
    assert set(world.answers(Grammar.of_schema({**schema, "x-order": 3, "deprecated": True}), 1, 9)) <= {
        "true",
        "false",
    }


def test_a_schema_that_is_too_deep_is_refused():
    schema = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(PshareError, match="nested too deeply"):
        Grammar.of_schema(schema)


# --- other grammars ------------------------------------------------------------------------------------------------------

REGEXES = [
    "[a-c]{2,4}",
    "(foo|bar)?é*!",
    "(?i)ab+",
    "[^a-z]{1,3}",
    "\\d{2}(\\.\\d)?",
    "^x|y$",
    "日本?語",
    "[\\u{1F300}-\\u{1F3FF}]+z",
]


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_match_the_whole_regex(worlds, family, regex):
    texts = worlds[family].answers(Grammar.of_regex(regex), 7, 6)
    assert len(texts) > 2
    python = regex.replace("\\u{1F300}-\\u{1F3FF}", "\U0001f300-\U0001f3ff")
    for text in texts:
        assert re.fullmatch(python, text), text


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=5), st.integers(0, 99)
)
def test_an_answer_is_one_of_the_choices(worlds, texts, seed):
    world = worlds["gemma3"]
    grammar = Grammar.of_choice(texts)
    found = world.answers(grammar, seed, 2) if any(texts) else [""]
    assert found
    assert set(found) <= set(texts)
    for text in texts:
        assert world.allows(grammar, text) == "whole"


def test_gbnf_and_lark(world):
    gbnf = 'root ::= "<" word ("," ws word)* ">"\nword ::= [a-c]+ # a word\nws ::= " "?'
    lark = '// a list\nstart: "<" WORD ("," " "? WORD)* ">"\nWORD: /[a-c]+/'
    with pytest.raises(BadGrammar, match="'start' already exists"):
        Grammar.of_text('root ::= start\nstart ::= "a"')
    assert world.allows(Grammar.of_text('?start : "a"'), "a") == "whole"
    for grammar in map(Grammar.of_text, (gbnf, lark)):
        assert world.allows(grammar, "<ab, c,a>") == "whole"
        assert world.allows(grammar, "<ab") == "begun"
        assert world.allows(grammar, "<>") is None
        assert all(re.fullmatch("<[a-c]+(, ?[a-c]+)*>", text) for text in world.answers(grammar, 2, 8))


NO_GRAMMARS = {
    "an empty text": lambda: Grammar.of_text(""),
    "another language": lambda: Grammar.of_text("SELECT * FROM x"),
    "an open literal": lambda: Grammar.of_text('root ::= "a'),
    "an open literal in Lark": lambda: Grammar.of_text('start: "a'),
    "an unknown rule": lambda: Grammar.of_text("start: other"),
    "an unknown GBNF rule": lambda: Grammar.of_text("root ::= other"),
    "a rule that does not end": lambda: Grammar.of_text("start: start"),
    "an unknown token": lambda: Grammar.of_text("start: <|nothing|>"),
    "deep brackets": lambda: Grammar.of_text("root ::= " + "(" * 50_000),
    "many blank lines": lambda: Grammar.of_text("\n" * 199_000),
    "a long text": lambda: Grammar.of_text("start: " + "x" * module.MAX_TEXT),
    "a long schema": lambda: Grammar.of_schema({"enum": ["x" * 1000] * 300}),
    "no choice": lambda: Grammar.of_choice([]),
    "an open bracket": lambda: Grammar.of_regex("("),
    "a look-around": lambda: Grammar.of_regex("a(?!b)"),
    "a reference": lambda: Grammar.of_regex("(a)\\1"),
    "a number that is not finite": lambda: Grammar.of_schema({"const": float("nan")}),
}


@pytest.mark.parametrize("name", NO_GRAMMARS)
def test_what_is_no_grammar_is_refused_in_a_sentence(world, name):
    with pytest.raises(PshareError) as caught:
        world.compiler.matcher(NO_GRAMMARS[name]())
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 400
    assert "no_forcing" not in message


# --- tokens --------------------------------------------------------------------------------------------------------------


def test_control_tokens_and_ids_without_a_token_are_never_allowed(worlds):
    for world in worlds.values():
        matcher = world.compiler.matcher(Grammar.of_regex("(?s:.)*"), [VOCAB - 2])
        for text in ("", "x", "日"):
            for token in world.ids(text):
                matcher.push(token)
            found = set(np.flatnonzero(allowed(matcher)).tolist())
            assert found - {VOCAB - 2} <= world.bytes.keys()
            assert VOCAB - 2 in found


def test_a_control_token_that_the_grammar_names_is_allowed(world):
    index = world.compiler.special_tokens["<|im_start|>"]
    for name in ("<|im_start|>", f"<[{index}]>"):
        matcher = world.compiler.matcher(Grammar.of_text(f'start: {name} "a"'))
        assert np.flatnonzero(allowed(matcher)).tolist() == [index]
        matcher.push(index)
        assert np.flatnonzero(allowed(matcher)).tolist() == world.ids("a")


def test_half_a_character_is_followed_by_its_rest_alone(world):
    matcher = world.compiler.matcher(Grammar.of_regex("(?s:.)*"), [VOCAB - 1])
    for byte in "👨".encode()[:3]:
        matcher.push(world.id_of[bytes([byte])])
        found = allowed(matcher)
        assert not found[VOCAB - 1]
        assert all(0x80 <= world.bytes[token][0] < 0xC0 for token in np.flatnonzero(found))


@pytest.mark.parametrize("size", [320, 321, 351, 352, 353])
def test_a_mask_has_a_bit_for_each_logit(world, size):
    compiler = GrammarCompiler(world.tokenizer, size)
    matcher = compiler.matcher(Grammar.of_choice(["a", "b"]), [size - 1, size, 10**6])
    assert np.flatnonzero(allowed(matcher, size)).tolist() == world.ids("ab")
    matcher.push(world.ids("a")[0])
    assert np.flatnonzero(allowed(matcher, size)).tolist() == [size - 1]


# --- the end of an answer ------------------------------------------------------------------------------------------------


def test_stop_ids_are_allowed_where_the_answer_may_end_and_nowhere_else(world):
    stop, letter = VOCAB - 1, world.ids("b")[0]
    matcher = world.compiler.matcher(Grammar.of_regex("ab*"), [stop, letter])
    assert np.flatnonzero(allowed(matcher)).tolist() == world.ids("a")
    matcher.push(world.ids("a")[0])
    assert set(np.flatnonzero(allowed(matcher)).tolist()) == {letter, stop}


def test_min_tokens_bans_stop_ids_unless_the_grammar_leaves_nothing_else(world):
    stop, (a,) = VOCAB - 1, world.ids("a")
    matcher = world.compiler.matcher(Grammar.of_regex("a{1,3}"), [stop], 3)
    for expected in ({a}, {a}, {a}, {stop}):
        assert set(np.flatnonzero(allowed(matcher)).tolist()) == expected
        if a in expected:
            matcher.push(a)
    matcher = world.compiler.matcher(Grammar.of_choice(["a"]), [stop], 3)
    matcher.push(a)
    assert np.flatnonzero(allowed(matcher)).tolist() == [stop]
    assert matcher.finished


def test_without_stop_ids_an_answer_is_finished_once_nothing_may_follow(world):
    matcher = world.compiler.matcher(Grammar.of_choice(["a", "ab"]))
    assert not matcher.finished
    matcher.push(world.ids("a")[0])
    assert np.flatnonzero(allowed(matcher)).tolist() == world.ids("b")
    matcher.push(world.ids("b")[0])
    assert matcher.finished


def test_where_only_stop_ids_would_do_the_answer_fails(world):
    matcher = world.compiler.matcher(Grammar.of_choice(["ab"]), world.ids("b"))
    matcher.push(world.ids("a")[0])
    with pytest.raises(GrammarFailed, match="stop token"):
        allowed(matcher)


def test_an_answer_that_leaves_its_grammar_fails(world):
    matcher = world.compiler.matcher(Grammar.of_choice(["ab"]))
    with pytest.raises(GrammarFailed, match="left its grammar"):
        matcher.push(world.ids("x")[0])


def test_a_grammar_that_becomes_too_complex_fails(world):
    matcher = world.compiler.matcher(Grammar.of_text('start: s\ns: "x" s | "x"'))

    def follow():
        for _ in range(2000):
            allowed(matcher)
            matcher.push(world.ids("x")[0])

    with pytest.raises(GrammarFailed, match="too complex"):
        follow()


def test_a_begun_answer_belongs_to_the_answer(world):
    grammar = Grammar.of_regex("abc?d?")
    matcher = world.compiler.matcher(grammar, [VOCAB - 1], 1, world.ids("ab"))
    # The begun tokens do not count for min_tokens.
    assert set(np.flatnonzero(allowed(matcher)).tolist()) == set(world.ids("cd"))
    with pytest.raises(BadGrammar, match="begun"):
        world.compiler.matcher(grammar, [VOCAB - 1], 0, world.ids("b"))
    with pytest.raises(BadGrammar, match="no text"):
        world.compiler.matcher(grammar, (), 0, world.ids("abcd"))


# --- the compiler --------------------------------------------------------------------------------------------------------


def test_the_cache_is_bounded_and_keeps_what_is_used(world, monkeypatch):
    compiled = []
    monkeypatch.setattr(module, "LLMatcher", noted(module.LLMatcher, compiled))
    monkeypatch.setattr(module, "MAX_CACHED", 4)
    compiler, kept = GrammarCompiler(world.tokenizer, VOCAB), Grammar.of_choice(["kept"])
    for number in range(9):
        compiler.check(kept)
        compiler.check(Grammar.of_choice([f"{number}"]))
    assert len(compiled) == 10
    assert len(compiler._cache) == 4


def noted(kind, made):
    class Noted:
        def __new__(cls, *arguments, **options):
            made.append(arguments)
            return kind(*arguments, **options)

    return Noted


def test_answers_of_one_grammar_are_independent_in_any_thread(world):
    grammar = Grammar.of_schema(Schemas(4).object(2))
    expected = world.answers(grammar, 5, 8)
    found = {}

    def work(name):
        compiler = world.compiler if name % 2 else GrammarCompiler(world.tokenizer, VOCAB)
        for _ in range(3):
            compiler.check(grammar)
        found[name] = world.answers(grammar, 5, 8)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [expected] * 6
