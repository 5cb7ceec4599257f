"""Calls that an answer must have, from random weights at a high temperature: each that ends can be read and obeys its schema."""

import json

import jsonschema
import numpy as np
import pytest
from tiny_engine import Engines

from pshare_jax.sampling.params import SamplingParams
from pshare_jax.text.tool_calls import CallPiece, ToolCallParser
from pshare_jax.text.tool_format import FORMATS, ToolFormat
from pshare_jax.text.tool_grammar import tool_grammar

WORD = {"type": "string", "maxLength": 6}
PARAMETERS = {
    "get.time": {},
    "wetter-ü": {
        "city": {"enum": ["Oslo", 'Ro"me}', "北京", None]},
        "days": {"type": "integer", "minimum": 0, "maximum": 7},
    },
    "move": {"path": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 3}},
    "note": {"text": WORD, "tags": {"type": "array", "items": WORD, "maxItems": 2}, "done": {"type": "boolean"}},
    "either": {
        "value": {"anyOf": [{"type": "null"}, {"const": {"a": []}}, {"type": "string", "pattern": "^[0-9]{2}$"}]}
    },
}
POINT = {
    "type": "array",
    "prefixItems": [{"enum": [0, 1]}, {"enum": [0, 1]}],
    "minItems": 2,
    "maxItems": 2,
    "items": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties)[:2],
                "additionalProperties": False,
                "$defs": {"point": POINT},
            },
        },
    }
    for name, properties in PARAMETERS.items()
]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
FORMS = [*FORMATS.values(), ToolFormat("marked_list", "[CALLS]", "", "list")]
NUM_ANSWERS = 50


@pytest.fixture(scope="module")
def world(tiny_folders):
    return Engines(tiny_folders["llama"], {"chat": "base"}, pages=400, rows=8)


def test_finished_answers_are_calls_that_obey_their_schemas(world):
    draw = np.random.default_rng(5)
    requests, wanted = [], []
    for number in range(NUM_ANSWERS):
        form, parallel = FORMS[number % len(FORMS)], bool(number % 2)
        choice = str(draw.choice(["required", *SCHEMAS]))
        grammar = tool_grammar(form, TOOLS, choice, parallel)
        prompt = draw.integers(0, world.model.config.vocab_size, int(draw.integers(1, 30)))
        sampling = SamplingParams(temperature=1.5, seed=number)
        ends = frozenset(world.tokenizer.eos_ids)
        requests.append(world.request("chat", prompt, 150, sampling=sampling, stop_ids=ends, grammar=grammar))
        wanted.append((form, choice, parallel))
    finished = 0
    for (form, choice, parallel), answer in zip(wanted, world.run(*requests), strict=True):
        reason, texts = answer.events[-1].finish_reason, [event.text for event in answer.events]
        text, calls = calls_of(form, texts)
        assert (text, calls) == calls_of(form, ["".join(texts)])
        ended = reason == "stop"
        if ended:
            finished += 1
            assert text == ""
            assert calls
            assert (parallel and choice == "required") or len(calls) == 1
        # The last call of an answer that is too long may break off.
        for name, arguments in calls if ended else calls[:-1]:
            assert name == choice or choice == "required"
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert finished > NUM_ANSWERS / 2


def calls_of(form, texts):
    """An answer's text beside its calls, and their names and arguments."""
    parser, text, calls = ToolCallParser(form, set(SCHEMAS)), "", []
    for piece in [*(piece for text in texts for piece in parser.push(text)), *parser.finish()]:
        if not isinstance(piece, CallPiece):
            text += piece
        elif piece.name is not None:
            calls.append([piece.name, ""])
        else:
            calls[-1][1] += piece.arguments
    return text, calls
