"""What an answer may be: grammars for constrained decoding, compiled and matched by llguidance. Host code without jax.

The server makes a `Grammar` from a request's fields; the engine follows each answer with a `TokenMatcher`, whose mask the
sampler applies on the device.
"""

import copy
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Int32
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from pshare_jax.errors import PshareError
from pshare_jax.text.grammar_errors import plain, sentence
from pshare_jax.text.schema_checks import MAX_DEPTH, check_schema, closed, with_known_formats

JSON_FORM = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # Without \u escapes, which could write the name of a listed property in a second way.
    "json_allowed_escapes": 'nrbtf\\"',
}
"""JSON on one line, with at most one blank after a comma or colon: small models write endless blanks where they may."""
OPTIONS = '\n%llguidance {"no_forcing": true}\n'
"""Text that a grammar forces may be cut into any tokens: the model knows best which, and nothing has to be tokenised."""
MAX_TEXT = 200_000
"""Characters of a grammar's text; the time to compile one grows with it."""
MAX_CACHED = 64
STACK_BYTES = 2**30
"""Addresses for the stack of a compilation, of which it uses what it needs: 30 KB a level, and `MAX_TEXT` limits the levels."""
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=100_000,
    step_max_items=10_000,
    step_lexer_fuel=100_000,
    max_lexer_states=10_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""What one grammar may cost: about 2 s to compile, without the interpreter's lock, 0.1 s a token, and 20 MB at worst. An answer
that reaches the limits ends with an error."""


T = TypeVar("T")
_stacks = threading.Lock()


class BadGrammar(PshareError):
    """A grammar that cannot be used."""


class GrammarFailed(BadGrammar):
    """An answer cannot be continued under its grammar: the grammar is too complex, or nothing that it allows is possible."""


@dataclass(frozen=True)
class Grammar:
    """A grammar in llguidance's variant of Lark, or several in JSON.

    The constructors check only what they must understand; `GrammarCompiler.check` says whether it can be compiled.
    """

    text: str

    @classmethod
    def of_lark(cls, lark: str) -> "Grammar":
        """A grammar in Lark, with the rule `start`."""
        return cls(lark + OPTIONS)

    def with_part(self, name: str, part: "Grammar") -> "Grammar":
        """The grammar with another one, to which its rules refer as `@name`."""
        grammars = [{"lark_grammar": self.text}, {"name": name, "lark_grammar": part.text}]
        return Grammar(json.dumps({"grammars": grammars}))

    @classmethod
    def of_schema(cls, schema: Mapping[str, Any] | bool) -> "Grammar":
        """JSON that a schema allows, written as `JSON_FORM` says; properties come in the schema's order.

        Raises:
            PshareError: the schema has a keyword that cannot be obeyed.
        """
        return cls.of_lark(f"start: %json {schema_text(schema)}")

    @classmethod
    def any_object(cls) -> "Grammar":
        """Any JSON object."""
        return cls.of_schema({"type": "object"})

    @classmethod
    def of_regex(cls, regex: str) -> "Grammar":
        r"""Text that a regular expression (Rust's syntax, no look-around) matches as a whole; `\d` are the digits of ASCII."""
        return cls.of_lark(f"start: /{regex_to_lark(regex, 'd')}/" if regex else 'start: ""')

    @classmethod
    def of_choice(cls, texts: Sequence[str]) -> "Grammar":
        """One of some texts."""
        if not texts:
            raise BadGrammar("A choice needs at least one text.")
        return cls.of_lark("start: " + " | ".join(map(lark_string, texts)))

    @classmethod
    def of_text(cls, text: str) -> "Grammar":
        """A grammar in llguidance's Lark variant (rule `start`), or in GBNF (rule `root`).

        Raises:
            BadGrammar: the text is too long or not GBNF.
        """
        _check_length(text)
        if _is_lark(text):
            return cls.of_lark(text)
        try:
            return cls.of_lark(gbnf_to_lark(text))
        except Exception as error:
            # The converter has no exception of its own for all that can be wrong; it fails on long texts with an IndexError.
            raise BadGrammar(f"The grammar has no rule `start` and is not GBNF: {plain(str(error))}.") from error


def schema_text(schema: Mapping[str, Any] | bool) -> str:
    """A checked schema as JSON text with the options of `JSON_FORM`, for a grammar or for `%json` in Lark.

    Raises:
        PshareError: the schema has a keyword that cannot be obeyed.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    try:
        # The checks of a longer one would take long themselves.
        _check_length(json.dumps(schema))
    except RecursionError:
        raise BadGrammar(f"The schema is nested too deeply; at most {MAX_DEPTH} levels are allowed.") from None
    check_schema(schema)
    return json.dumps({**closed(with_known_formats(schema)), "x-guidance": JSON_FORM})


def lark_string(text: str) -> str:
    """A text as a literal of Lark."""
    # The library's lexer takes any character but DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


@runtime_checkable
class Vocabulary(Protocol):
    """What a compiler needs of a tokenizer; see `Tokenizer`."""

    @property
    def special_ids(self) -> Collection[int]:
        """Ids of the control tokens."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        ...


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps the last `MAX_CACHED`. Any thread may use it.

    `vocab_size` is the width of the model's logits; ids without a token are never allowed, and control tokens only where
    a grammar names them. The first use takes a second for a large vocabulary, as does compiling a large grammar.
    """

    def __init__(self, tokenizer: Vocabulary, vocab_size: int):
        self._tokenizer, self.vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, LLMatcher] = OrderedDict()

    def check(self, grammar: Grammar) -> None:
        """Compiles a grammar, so that `matcher` is quick.

        Raises:
            BadGrammar: it is not a grammar, too large, or has a part that is not supported.
        """
        self.prototype(grammar)

    def prototype(self, grammar: Grammar) -> LLMatcher:
        """The library's matcher at the start of an answer, to be copied (`deep_copy`); otherwise as `check`."""
        with self._lock:
            if (found := self._cache.get(grammar.text)) is not None:
                self._cache.move_to_end(grammar.text)
                return found
        _check_length(grammar.text)
        matcher = _on_large_stack(lambda: self._compiled(grammar))
        if matcher.is_error():
            raise BadGrammar(sentence(matcher.get_error()))
        if warnings := matcher.get_grammar_warnings():
            # A part that is ignored gives answers that do not match.
            raise BadGrammar(sentence(warnings[0]))
        with self._lock:
            self._cache[grammar.text] = matcher
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return matcher

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        matcher = LLMatcher(self.tokens, grammar.text, log_level=0, limits=LIMITS)
        if not matcher.is_error() and not matcher.is_stopped():
            # The first mask shows grammars that end nowhere; what it has computed is copied with the matcher.
            matcher.compute_bitmask()
        return matcher

    def matcher(
        self, grammar: Grammar, stop_ids: Collection[int] = (), min_tokens: int = 0, begun: Sequence[int] = ()
    ) -> "TokenMatcher":
        """A matcher at the start of an answer, or behind the ids `begun`.

        Raises:
            BadGrammar: as `check`; or the begun answer does not match; or nothing may follow, and no stop id can say so.
        """
        matcher = self.prototype(grammar).deep_copy()
        if not matcher.consume_tokens(list(begun)):
            raise BadGrammar("The begun answer does not match the grammar; change either.")
        found = TokenMatcher(matcher, self.vocab_size, stop_ids, min_tokens)
        if found.finished and not found.has_stops:
            raise BadGrammar("The grammar allows no text at the start of the answer; change it.")
        return found

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the control tokens by their text."""
        return {self._tokenizer.token_bytes(index).decode(): index for index in self._tokenizer.special_ids}

    @cached_property
    def tokens(self) -> LLTokenizer:
        """The vocabulary as the library sees it; its end token is one more id, so that no token of the model is special."""
        return LLTokenizer(_Wrapper(self._tokenizer, self.vocab_size))  # pyright: ignore[reportArgumentType]


class _Wrapper:
    """A tokenizer with the attributes that `LLTokenizer` reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Vocabulary, vocab_size: int):
        self.eos_token_id = vocab_size
        self.special_token_ids = [index for index in tokenizer.special_ids if index < vocab_size]
        self.tokens = [*map(tokenizer.token_bytes, range(vocab_size)), b"<end>"]
        self.special_token_ids.append(vocab_size)

    def __call__(self, text: str) -> list[int]:
        """Ids of a text. Needed only if a user's grammar asks for it; quick for any text."""
        return self._trie.greedy_tokenize(text)

    @cached_property
    def _trie(self) -> LLTokenizer:
        # Of its own: the library's tokenizer refers to this object, which must not refer back.
        return LLTokenizer(copy.copy(self))  # pyright: ignore[reportArgumentType]


class TokenMatcher:
    """Follows one answer: says which tokens may come next, and when the answer is complete. Used by one thread at a time.

    A stop id is allowed where the answer may end, and nowhere else. Before `min_tokens` tokens it is allowed only where the
    grammar leaves nothing else: then the grammar wins.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, stop_ids: Collection[int], min_tokens: int):
        self._matcher, self._min_tokens, self._num_tokens = matcher, min_tokens, 0
        self._stops = np.array(sorted(index for index in stop_ids if 0 <= index < vocab_size), np.int64)
        self._places, self._marks = self._stops // 32, (1 << self._stops % 32).astype(np.uint32)
        self._size = vocab_size
        # The library has one id more, its own end token.
        self._words = np.empty(vocab_size // 32 + 1, np.int32)
        self._finished = self._ends()

    @property
    def has_stops(self) -> bool:
        """Whether a stop id can end the answer."""
        return self._stops.size > 0

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing may follow it."""
        return self._finished

    def push(self, token_id: int) -> None:
        """Adds the answer's next token, unless it is a stop id, which ends the answer.

        Raises:
            GrammarFailed: the grammar does not allow it, or has reached its limits.
        """
        if not self._matcher.consume_token(token_id):
            raise self._failed()
        self._num_tokens += 1
        self._finished = self._ends()

    def fill(self, row: Int32[np.ndarray, "words"]) -> None:
        """Writes the next token's mask: bit i of word w says whether id 32 * w + i is allowed.

        Raises:
            GrammarFailed: no token is allowed, or the grammar has reached its limits.
        """
        words = self._computed()
        bits = words.view(np.uint32)
        may_end = bool(bits[self._size // 32] >> np.uint32(self._size % 32) & 1)
        bits[self._size // 32] &= np.uint32((1 << self._size % 32) - 1)
        np.bitwise_and.at(bits, self._places, ~self._marks)
        if may_end and (self._num_tokens >= self._min_tokens or not bits.any()):
            np.bitwise_or.at(bits, self._places, self._marks)
        if not bits.any():
            raise GrammarFailed("The grammar allows no token here that is not a stop token; change the grammar.")
        row[:] = words[: len(row)]

    def _computed(self) -> np.ndarray:
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            raise self._failed()
        return self._words

    def _ends(self) -> bool:
        if self._matcher.is_stopped():
            if self._matcher.is_error():
                raise self._failed()
            return True
        if self._stops.size or not self._matcher.is_accepting():
            return False
        # Sometimes the library learns only from the mask that nothing may follow; here no stop id could end the answer.
        words = self._computed().copy()
        words.view(np.uint32)[self._size // 32] &= np.uint32((1 << self._size % 32) - 1)
        return not words.any()

    def _failed(self) -> GrammarFailed:
        if "doesn't satisfy the grammar" in self._matcher.get_error():
            return GrammarFailed(
                "The answer has left its grammar: logit_bias must not ban all that the grammar allows."
            )
        return GrammarFailed("The grammar became too complex while the answer was generated; simplify it.")


def _on_large_stack(make: Callable[[], T]) -> T:
    """Runs a function in a thread of its own. The library descends into rules and references while it compiles, and the end
    of the stack would end the process.
    """
    made: Future[T] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    with _stacks:
        # The setting is the process's: threads that others start meanwhile only reserve more addresses.
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="compile-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return made.result()


def _is_lark(text: str) -> bool:
    # GBNF, too, may have a rule `start`.
    lines = (line.replace(" ", "").replace("\t", "") for line in text.splitlines())
    return any(re.match(r"%llguidance|[?!]?start(\[[^\]]*\])?:(?!:)", line) for line in lines)


def _check_length(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise BadGrammar(f"The grammar or schema has {len(text)} characters; at most {MAX_TEXT} are allowed.")
