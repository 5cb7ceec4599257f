"""Greedy generation for many prompts at once, for evaluation: base KV for a share of each prompt, then the decode module.

It runs the server's paged steps, which take rows of different lengths: every row has a stretch of pages of its own,
prompts are read in a few padded calls, one decode step serves all rows, and a row that ends makes place for the next
prompt. `generate.py` is what it must equal.
"""

import math
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.mesh import same_devices
from pshare_jax.model.kv.dense import bucket
from pshare_jax.model.kv.pages import empty_pages
from pshare_jax.model.paged_batch import PagedBatch
from pshare_jax.share.boundary import base_len, next_position
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.model import Model, checked_tokens

PAGE_SIZE = 16
CHUNK = 512
"""Tokens of a row that one prefill call reads at most."""
CALL_TOKENS = 4096
"""Tokens of all rows that one prefill call reads at most, padding included: bounds the memory of its attention scores."""


def generate_batch(
    base: Model,
    module: DecodeModule,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | None = None,
    sharing_ratio: float = 1.0,
    rows: int = 16,
) -> list[list[int]]:
    """Greedy new token ids of every prompt, in order, the end token included if one came.

    `stop_ids` None means the base's end set, () none. Of a prompt's n tokens the base encodes the first
    floor(sharing_ratio * (n - 1)), the module the others: 1 is PrefillShare, 0 the module by itself. At most `rows`
    prompts are in memory at a time, each with the KV of the longest prompt and its answer.

    Raises:
        PshareError: a prompt that is empty, too long or has unknown ids, a wrong number, or a module on other devices.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for index, ids in generate_each(
        base,
        module,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sharing_ratio=sharing_ratio,
        rows=rows,
    ):
        answers[index] = ids
    return answers


def generate_each(
    base: Model,
    module: DecodeModule,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] | None = None,
    sharing_ratio: float = 1.0,
    rows: int = 16,
) -> Iterator[tuple[int, list[int]]]:
    """As `generate_batch`, but gives (index of the prompt, new ids) as answers end. Arguments are checked at once."""
    _check(base, module, prompts, max_new_tokens, sharing_ratio, rows)
    if not prompts or max_new_tokens == 0:
        return iter([(index, []) for index in range(len(prompts))])
    row_len = bucket(max(map(len, prompts)) + max_new_tokens)
    num_rows = min(rows, bucket(len(prompts), smallest=1))
    batch = _Batch(base, module, num_rows, row_len, sharing_ratio)
    stops = base.stop_ids if stop_ids is None else frozenset(stop_ids)
    return _generated(batch, prompts, max_new_tokens, stops)


def num_shared(prompt_len: int, sharing_ratio: float) -> int:
    """Leading tokens of a prompt that the base encodes: floor(ratio * (n - 1)); the module consumes the last one always."""
    # 0.29 * 100 is 28.999999999999996.
    return math.floor(sharing_ratio * base_len(prompt_len) + 1e-9)


def _check(
    base: Model,
    module: DecodeModule,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sharing_ratio: float,
    rows: int,
) -> None:
    if max_new_tokens < 0:
        raise PshareError(f"max_new_tokens must not be negative, but is {max_new_tokens}.")
    if not 0 <= sharing_ratio <= 1:
        raise PshareError(f"sharing_ratio must be from 0 to 1, but is {sharing_ratio}.")
    if rows < 1:
        raise PshareError(f"rows must be at least 1, but is {rows}.")
    if not same_devices(base.mesh, module.mesh):
        raise PshareError("this decode module lies on other devices than the base.")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise PshareError(f"prompt {index} is empty: at least one token is needed.")
        if len(prompt) + max_new_tokens > base.config.max_len:
            raise PshareError(
                f"the model's maximum context length is {base.config.max_len} tokens, but prompt {index} has "
                f"{len(prompt)} and {max_new_tokens} more were asked for."
            )
        checked_tokens([prompt], base.config)


@dataclass
class _Row:
    """A prompt on its way: which one, where its pages are, and the new ids so far."""

    index: int
    prompt: Sequence[int]
    slot: int
    ids: list[int] = field(default_factory=list)

    @property
    def next_input(self) -> int:
        return self.ids[-1] if self.ids else self.prompt[-1]

    @property
    def num_stored(self) -> int:
        """Tokens before the next input."""
        return next_position(len(self.prompt) + len(self.ids))


def _generated(
    batch: "_Batch", prompts: Sequence[Sequence[int]], max_new_tokens: int, stops: frozenset[int]
) -> Iterator[tuple[int, list[int]]]:
    # Prompts of like length are read together, with little padding.
    waiting = deque(sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True))
    running: list[_Row] = []
    while waiting or running:
        # Reading many prompts in one call is faster than one now and then.
        if waiting and len(running) * 2 <= batch.num_rows:
            free = sorted(set(range(batch.num_rows)) - {row.slot for row in running})
            indices = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
            started = [
                _Row(index, prompts[index], slot) for index, slot in zip(indices, free[: len(indices)], strict=True)
            ]
            batch.read(started)
            running += started
        for row, token in zip(running, batch.next_tokens(running), strict=True):
            row.ids.append(token)
        ended = [row.ids[-1] in stops or len(row.ids) == max_new_tokens for row in running]
        yield from ((row.index, row.ids) for row in compress(running, ended))
        running = [row for row, is_over in zip(running, ended, strict=True) if not is_over]


class _Batch:
    """The pages of `num_rows` rows of `row_len` tokens, and the calls over them."""

    def __init__(self, base: Model, module: DecodeModule, num_rows: int, row_len: int, sharing_ratio: float) -> None:
        self.num_rows = num_rows
        self._base, self._module, self._sharing_ratio = base, module, sharing_ratio
        self._pages_of_row = row_len // PAGE_SIZE
        num_pages = 1 + num_rows * self._pages_of_row
        self._pages = empty_pages(base.config, num_pages, PAGE_SIZE, base.architecture.dtype, base.mesh)

    def read(self, rows: Sequence[_Row]) -> None:
        """Fills the pages of new rows with the KV of all but their last token: first the base's part, then the module's."""
        borders = [num_shared(len(row.prompt), self._sharing_ratio) for row in rows]
        self._prefill(self._base, [(row, 0, border) for row, border in zip(rows, borders, strict=True)])
        ends = [base_len(len(row.prompt)) for row in rows]
        self._prefill(self._module, list(zip(rows, borders, ends, strict=True)))

    def next_tokens(self, rows: Sequence[_Row]) -> list[int]:
        """One decode step: the module's best next token of every row."""
        size = min(bucket(len(rows), smallest=1), self.num_rows)
        tokens = np.zeros((size, 1), np.int32)
        tokens[: len(rows), 0] = [row.next_input for row in rows]
        meta = self._rows(size, [row.slot for row in rows], [row.num_stored for row in rows], [1] * len(rows))
        logits, self._pages = self._module.paged.decode(self._module.params, tokens, meta, self._pages)
        return np.asarray(_best(logits))[: len(rows)].tolist()

    def _prefill(self, weights: Model | DecodeModule, spans: Sequence[tuple[_Row, int, int]]) -> None:
        """KV of the tokens start .. end - 1 of every row, on what its pages hold before them.

        A call takes rows of one bucket, and a power of two of them: no row is padding, and few shapes are compiled.
        """
        left = [(row, start, end) for row, start, end in spans if start < end]
        while left:
            widths = [bucket(min(CHUNK, end - start)) for _, start, end in left]
            width = max(widths)
            alike = [span for span, its_width in zip(left, widths, strict=True) if its_width == width]
            others = [span for span, its_width in zip(left, widths, strict=True) if its_width != width]
            most = max(1, min(len(alike), CALL_TOKENS // width))
            call = alike[: 1 << most.bit_length() - 1]
            self._prefill_call(weights, width, call)
            rests = [(row, start + width, end) for row, start, end in call if start + width < end]
            left = [*rests, *alike[len(call) :], *others]

    def _prefill_call(self, weights: Model | DecodeModule, width: int, call: Sequence[tuple[_Row, int, int]]) -> None:
        counts = [min(width, end - start) for _, start, end in call]
        tokens = np.zeros((len(call), width), np.int32)
        for line, (row, start, _), count in zip(tokens, call, counts, strict=True):
            line[:count] = row.prompt[start : start + count]
        meta = self._rows(len(call), [row.slot for row, _, _ in call], [start for _, start, _ in call], counts)
        _, self._pages = weights.paged.prefill(weights.params, tokens, meta, self._pages)

    def _rows(self, size: int, slots: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> PagedBatch:
        rows = PagedBatch.empty(size, self._pages_of_row)
        for line, (slot, length, count) in enumerate(zip(slots, lengths, counts, strict=True)):
            first = 1 + slot * self._pages_of_row
            rows.fill(line, range(first, first + self._pages_of_row), length, count)
        return rows


@jax.jit
def _best(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1)
