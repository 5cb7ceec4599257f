"""Stand-ins for the model side: pages, weights and a sampler that run on the host, and a tokenizer of bytes.

A fake page remembers for each slot which token was written there, by whom and after what, so that a wrong page table, a lost
copy or a stale page is seen by whoever reads it: it is noted as a fault, and the answer goes wrong. fake_engine.py puts
engines together from these.
"""

import functools
import threading
import zlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from pshare_jax.engine.request import TokenLogprobs
from pshare_jax.errors import PshareError
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.sampling.params import all_allowed
from pshare_jax.share.boundary import Boundary
from pshare_jax.text.chat_template import checked_messages
from pshare_jax.text.tool_format import FORMATS, ToolFormat

VOCAB = 260
EOS, EOT = 257, 258
WRONG = ord("?")
"""What a decode step says when its context is not what it must be."""

NOBODY, PREFILL, DECODE, FAILED_STEP = range(4)
TOKEN, WRITER, CHAIN = range(3)
START = 1


def chain(before: Any, token: Any) -> Any:
    """A slot's third number: it depends on all tokens up to its own, as KV does."""
    return (before * 31 + token + 7) % 1_000_003


# --- pages -----------------------------------------------------------------------------------------------------------


class Gate:
    """What becomes of a copy: it comes after so many looks (None: once the test opens it), or it fails."""

    def __init__(self, polls: int | None = None, error: Exception | None = None):
        self.polls, self.error = polls, error
        self.open = False

    def look(self) -> bool:
        if self.polls is not None:
            self.polls -= 1
            self.open = self.open or self.polls < 0
        return self.open


class Content:
    """Pages outside a pool, as an array that may not be there yet."""

    def __init__(self, data: np.ndarray, gate: Gate | None = None):
        self.data, self.gate = data.copy(), gate

    @property
    def there(self) -> bool:
        return self.gate is None or self.gate.open

    def is_ready(self) -> bool:
        return self.gate is None or self.gate.look()

    def block_until_ready(self) -> "Content":
        if self.gate is not None and self.gate.error is not None:
            raise self.gate.error
        _raise_if_failed(self.data)
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.data


class FakeStore:
    """A pool's pages: `[pages, page_size, 3]` of token, who wrote it, and `chain`.

    `gates` decides over copies placed here that hold a certain token, or `gate_of` over any. One thread alone may touch it.
    """

    def __init__(self, num_pages: int, page_size: int, move_buckets: Sequence[int], faults: list[str]):
        self.num_pages, self.page_size, self.move_buckets = num_pages, page_size, move_buckets
        self.faults = faults
        self.gates: dict[int, Gate] = {}
        self.gate_of: Callable[[set[int]], Gate | None] = self._gate_by_token
        self.refused: set[int] = set()
        self.num_filled = 0
        self._thread: int | None = None
        self.pages: Any = None
        self.reset()

    def run(self, step: Callable[..., tuple[Any, Any]], params: Any, tokens: Any, rows: Any) -> Any:
        self._touch()
        # A step that fails has taken the arrays with it.
        pages, self.pages = self.pages, None
        result, self.pages = step(params, tokens, rows, pages)
        return result

    def empty_tables(self, num_slots: int, table_len: int) -> np.ndarray:
        return np.zeros((num_slots, table_len), np.int32)

    def put_table(self, tables: np.ndarray, slot: int, pages: Sequence[int]) -> np.ndarray:
        self._touch()
        tables = tables.copy()
        tables[slot] = 0
        tables[slot, : len(pages)] = pages
        return tables

    def gather(self, ids: Sequence[int]) -> Content:
        self._touch()
        self._check_ids(ids)
        return Content(self.pages[list(ids)])

    def device_put(self, content: Any) -> Content:
        data = np.asarray(content)
        tokens = set(data[..., TOKEN].ravel().tolist())
        if tokens & self.refused:
            raise RuntimeError("made to fail")
        # What comes from host memory is written at once.
        return Content(data, self.gate_of(tokens) if isinstance(content, Content) else None)

    def scatter(self, ids: Sequence[int], content: Content) -> None:
        self._touch()
        self._check_ids(ids)
        if not content.there:
            self.faults.append(f"pages {ids} were written before they had come")
        self.pages[list(ids)] = content.data

    def fill(self, ids: Sequence[int]) -> None:
        self._touch()
        self.num_filled += len(ids)
        self.pages[list(ids)] = -1, NOBODY, -1

    def reset(self) -> None:
        self.pages = np.empty((self.num_pages, self.page_size, 3), np.int64)
        self.pages[:] = -1, NOBODY, -1

    def _gate_by_token(self, tokens: set[int]) -> Gate | None:
        return next((gate for token, gate in self.gates.items() if token in tokens), None)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not 0 < len(set(ids)) == len(ids) <= self.move_buckets[-1] or min(ids) < 1:
            self.faults.append(f"pages {ids} cannot be moved at once")

    def _touch(self) -> None:
        self._thread = self._thread or threading.get_ident()
        if self._thread != threading.get_ident():
            self.faults.append("two threads touch one pool")


# --- weights ---------------------------------------------------------------------------------------------------------


class Echo:
    """An answer whose every token depends on `salt`, on all tokens before it and on how many of them are the answer's."""

    def __init__(self, salt: str):
        self.salt = salt

    def next_id(self, context: Sequence[int], made: int) -> int:
        return zlib.crc32(np.asarray([made, *context], np.int64).tobytes(), zlib.crc32(self.salt.encode())) % 250

    def answer(self, prompt: Sequence[int], count: int) -> list[int]:
        """The right answer's ids."""
        context = list(prompt)
        for made in range(count):
            context.append(self.next_id(context, made))
        return context[len(prompt) :]


class Script:
    """Says the same after any prompt, over and over."""

    def __init__(self, ids: Sequence[int]):
        self.ids = ids

    def next_id(self, context: Sequence[int], made: int) -> int:
        return self.ids[made % len(self.ids)]


class _Fake:
    """What both kinds of weights have in common: hooks for tests, and reading and writing pages."""

    def __init__(self, faults: list[str]):
        self.params = object()
        self.slot = 0
        self.faults = faults
        self.fail_on: int | None = None
        """A token whose presence among the step's makes it fail."""
        self.before: Callable[[], Any] = lambda: None
        """Called at the beginning of every step."""

    @property
    def group(self) -> object:
        return self.params

    @property
    def current(self) -> Self:
        return self

    def _read(self, pages: np.ndarray, table: np.ndarray, length: int) -> np.ndarray:
        """What the row's first `length` slots hold."""
        slots = np.arange(length)
        ids = table[slots // pages.shape[1]]
        context = pages[ids, slots % pages.shape[1]]
        _raise_if_failed(context)
        before = np.concatenate([[START], context[:-1, CHAIN]])[:length]
        if (ids == 0).any() or (context[:, CHAIN] != chain(before, context[:, TOKEN])).any():
            self._fault("what was written at some page is not what belongs there", context)
        return context

    def _write(
        self, pages: np.ndarray, table: np.ndarray, context: np.ndarray, tokens: Sequence[int], writer: int
    ) -> None:
        size, before = pages.shape[1], context[-1, CHAIN] if len(context) else START
        for position, token in enumerate(tokens, len(context)):
            if table[position // size] == 0:
                self._fault(f"position {position} has no page", context)
            before = chain(before, token)
            pages[table[position // size], position % size] = token, writer, before

    def _fault(self, what: str, context: np.ndarray) -> None:
        self.faults.append(f"{what}: {context[:, :2].tolist()}")


class FakePrefill(_Fake):
    """Writes chunks; `chunks` lists them row by row. With `fail_late`, a step fails only after it was dispatched."""

    def __init__(self, faults: list[str]):
        super().__init__(faults)
        self.paged = SimpleNamespace(prefill=self._prefill)
        self.chunks: list[tuple[int, ...]] = []
        self.rows: list[int] = []
        self.fail_late = False

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)

    def _prefill(self, params: Any, tokens: np.ndarray, rows: Any, pages: np.ndarray) -> tuple[Any, np.ndarray]:
        self.before()
        chunks = [tuple(ids[:count].tolist()) for ids, count in zip(tokens, rows.query_lens, strict=True)]
        failed = self.fail_on is not None and any(self.fail_on in chunk for chunk in chunks)
        if failed and not self.fail_late:
            raise RuntimeError("made to fail")
        self.rows.append(len(chunks))
        self.chunks += chunks
        for table, length, chunk in zip(rows.page_table, rows.context_lens, chunks, strict=True):
            context = self._read(pages, table, int(length))
            if (context[:, WRITER] != PREFILL).any():
                self._fault("a prefill reads what prefill did not write", context)
            self._write(pages, table, context, chunk, FAILED_STEP if failed else PREFILL)
        return _Done(failed), pages


class _FailedLate(Exception):
    """The rest of a step that fails late."""


class FakeDecode(_Fake):
    """A task: `answer` chooses the next id. `inputs` lists all tokens that it was given, `rows` how many at a time."""

    def __init__(self, answer: Echo | Script, faults: list[str]):
        super().__init__(faults)
        self.answer = answer
        self.boundary = Boundary()
        self.base: FakeDecode | None = None
        self.paged = SimpleNamespace(decode=self._decode, score=self._score)
        self.inputs: list[int] = []
        self.scored: list[int] = []
        """All tokens that it was given to score."""
        self.rows: list[int] = []
        self.fail_at: int | None = None
        """How many ids of an answer are out when a step fails."""
        self.fail_late = False
        """Whether a step that fails is noticed only by who fetches its choices, or uses its pages."""

    def _decode(self, params: Any, rows: DecodeBatch, tables: np.ndarray, pages: np.ndarray) -> tuple[Any, np.ndarray]:
        self.before()
        if params is not self.params:
            self.faults.append("a task was decoded with the parameters of another")
        logits, tables = np.zeros((len(rows.slots), VOCAB), np.float32), tables.copy()
        tables[rows.slots, rows.context_lens // pages.shape[1]] = rows.new_pages
        real = [row for row, slot in enumerate(rows.slots) if slot < len(tables) - 1]
        self.rows.append(len(real))
        for row in real:
            slot = rows.slots[row]
            token, length = int(rows.tokens[slot]), int(rows.context_lens[row])
            try:
                logits[row, self._next(token, tables[slot], length, pages)] = 99.0
            except _FailedLate:
                logits[:] = np.nan
                break
        return (logits, tables), pages

    def _score(self, params: Any, tokens: np.ndarray, rows: Any, pages: np.ndarray) -> tuple[Any, np.ndarray]:
        """A target's log-probability is 0 if it is the answer's next token, else -1."""
        self.before()
        if params is not self.params:
            self.faults.append("a task was scored with the parameters of another")
        logprobs, best = np.full(tokens.shape, -1.0), np.zeros((*tokens.shape, 1), np.int64)
        for row, count in enumerate(rows.batch.query_lens):
            table, length = rows.batch.page_table[row], int(rows.batch.context_lens[row])
            for index, token in enumerate(tokens[row, :count].tolist()):
                best[row, index, 0] = self._scored(token, table, length + index, pages, bool(rows.independent))
                logprobs[row, index] = 0.0 if best[row, index, 0] == rows.targets[row, index] else -1.0
            self.scored += tokens[row, :count].tolist()
        return (logprobs, best, np.zeros(best.shape)), pages

    def _scored(self, token: int, table: np.ndarray, position: int, pages: np.ndarray, alone: bool) -> int:
        old = self._read(pages, table, position)
        made = int((old[:, WRITER] == DECODE).sum())
        if old[:, WRITER].tolist() != [PREFILL] * (position - made) + [DECODE] * made or (alone and made):
            self._fault("a token must be scored on prefill's KV, and then its own module's", old)
        if not alone:
            self._write(pages, table, old, [token], DECODE)
        return self.answer.next_id([*old[:, TOKEN].tolist(), token], made)

    def _next(self, token: int, table: np.ndarray, length: int, pages: np.ndarray) -> int:
        num_faults = len(self.faults)
        old = self._read(pages, table, length)
        self._write(pages, table, old, [token], DECODE)
        context = self._read(pages, table, length + 1)
        made = int((context[:, WRITER] == DECODE).sum()) - 1
        if self.fail_at == made or self.fail_on in context[:, TOKEN].tolist():
            if not self.fail_late:
                raise RuntimeError("made to fail")
            pages[table[length // pages.shape[1]], length % pages.shape[1], WRITER] = FAILED_STEP
            raise _FailedLate
        if context[:, WRITER].tolist() != [PREFILL] * (length - made) + [DECODE] * (made + 1):
            self._fault("the prompt must be prefill's, its last token and the answer decode's", context)
        self.inputs.append(token)
        if len(self.faults) > num_faults:
            return WRONG
        return self.answer.next_id(context[:, TOKEN].tolist(), made)


class FakeSampler:
    """Takes the best token, on the host; choice c > 0 of a request ends after c tokens.

    Under a grammar it takes the best token if that is allowed, else one that closes something, else the first that is allowed.
    """

    def lower(self, num_rows: int) -> Any:
        raise AssertionError("fakes are not compiled")

    def lower_join(self) -> Any:
        raise AssertionError("fakes are not compiled")

    def new_rows(self, num_slots: int) -> "FakeRows":
        return FakeRows(num_slots)


class FakeRows:
    """The last token of each slot, and the choices of steps."""

    def __init__(self, num_slots: int):
        self.tokens = np.zeros(num_slots + 1, np.int64)

    def join(self, slot: int, sequence: Any) -> None:
        self.tokens = self.tokens.copy()
        self.tokens[slot] = sequence.next_input

    def prepare(self, batch: Any, slots: Sequence[int], positions: Sequence[int], num_rows: int) -> Any:
        return functools.partial(self._choose, batch, slots, positions)

    def _choose(self, batch: Any, slots: Sequence[int], positions: Sequence[int], logits: Any) -> "FakePending":
        scores, failures = np.array(logits), {}
        for row, sequence in enumerate(batch):
            if sequence.matcher is not None:
                mask = all_allowed(1, VOCAB)
                scores[row, [*b'"}]']] += 3, 2, 1
                try:
                    sequence.matcher.fill(mask[0])
                except Exception as error:
                    failures[row] = error
                scores[row, np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB] == 0] = -np.inf
        ids = scores.argmax(-1).tolist()
        for row, sequence in enumerate(batch):
            made = positions[row] - len(sequence.request.prompt)
            if 0 < sequence.request.sampling.choice <= made and sequence.matcher is None:
                ids[row] = EOS
        self.tokens = self.tokens.copy()
        self.tokens[list(slots)] = ids[: len(slots)]
        return FakePending(logits, ids, failures)


class FakePending:
    """A step's choices."""

    def __init__(self, logits: Any, ids: list[int], failures: dict[int, Exception]):
        self._logits, self._ids, self._failures = logits, ids, failures

    def fetch(self) -> Any:
        if np.isnan(self._logits).any():
            raise RuntimeError("made to fail late")
        return self._chosen

    def _chosen(self, row: int, sequence: Any) -> tuple[int, TokenLogprobs | None]:
        if row in self._failures:
            raise self._failures[row]
        return self._ids[row], self._logprobs(self._logits[row], self._ids[row], sequence.request.logprobs)

    def _logprobs(self, scores: np.ndarray, token_id: int, wanted: int | None) -> TokenLogprobs | None:
        if wanted is None:
            return None
        best = np.argsort(-scores, kind="stable")[:wanted].tolist()
        return TokenLogprobs(token_id, float(scores[token_id]), tuple((one, float(scores[one])) for one in best))


class _Done:
    """A step's result that says whether it went well."""

    def __init__(self, failed: bool):
        self.failed = failed

    def is_ready(self) -> bool:
        return True

    def block_until_ready(self) -> None:
        if self.failed:
            raise RuntimeError("made to fail late")


def _raise_if_failed(data: np.ndarray) -> None:
    if (data[..., WRITER] == FAILED_STEP).any():
        raise RuntimeError("made to fail late")


# --- text ------------------------------------------------------------------------------------------------------------


class ByteTokenizer:
    """Ids 0..255 are bytes, the rest control tokens; templates join contents with newlines."""

    vocab_size = VOCAB
    chat_template = "a template"
    special_ids = frozenset(range(256, VOCAB))

    def __init__(self, tool_format: ToolFormat | None = FORMATS["hermes"]):
        self._tool_format = tool_format

    @property
    def special_tokens(self):
        return {"bos_token": None, "eos_token": "<eos>"}

    def decode(self, ids, *, skip_special_tokens=True):
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token_id):
        return bytes([token_id]) if token_id < 256 else f"<{token_id}>".encode()

    def encode(self, text, *, add_special_tokens=True, allow_special=True, refuse_from=None):
        return list(text.encode())

    def encode_chat(
        self, messages, *, tools=None, add_generation_prompt=True, template_kwargs=None, refuse_from=None, style=None
    ):
        if messages[0]["role"] == "assistant":
            raise PshareError("The chat template refuses these messages: roles must alternate.")
        extra = f"{len(tools)} tools\n" if tools else ""
        return list((extra + "\n".join(message.get("content", "") for message in checked_messages(messages))).encode())

    def encode_begun(self, messages, *, tools=None, template_kwargs=None, refuse_from=None, style=None):
        ids, begun = self.encode_chat(messages, tools=tools), messages[-1]["content"].encode()
        return ids, len(ids) - len(begun)

    def detokenizer(self):
        return ByteDetokenizer()

    def tool_format(self, style=None):
        return self._tool_format

    def turn_ends(self, style=None):
        return frozenset()


class ByteDetokenizer:
    def __init__(self):
        self.held = b""

    def push(self, token_id):
        if token_id > 255:
            return ""
        self.held += bytes([token_id])
        try:
            text = self.held.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            text = self.held.decode(errors="replace")
        self.held = b""
        return text

    def flush(self):
        text, self.held = self.held.decode(errors="replace"), b""
        return text
