"""The real SmolLM2 (GGUF): our logits, the plain loop and the HTTP server against transformers on the same file."""

import numpy as np
import pytest
import torch
from server_process import CHAT, ROOT, TEXT, serving
from transformers import AutoModelForCausalLM

from pshare_jax.text.tool_format import FORMATS, tools_text

QUESTION = "What is the capital of France? Answer briefly."
TEXT_PROMPT = (
    "The old lighthouse had stood on the cliff for more than two hundred years. Every evening its keeper climbed the "
    "narrow stairs, lit the lamp and wrote one line into a thick book: the weather, the ships that he had seen, and "
    "whether anybody had come to visit. Most evenings nobody had. Then, one night in late November, a small boat without "
    "lights came slowly out of the fog, and a voice called his name."
)
PROMPTS = (
    "The quick brown fox",
    "Once upon a time there was a small village by the sea, where",
    "def fibonacci(n):\n    ",
    "The three primary colours are red,",
    "Water boils at 100 degrees Celsius because",
)

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city's name."},
            "unit": {"type": "string", "description": "celsius or fahrenheit"},
        },
        "required": ["city"],
    },
}
ASKED = {
    "arithmetic": [
        {"role": "user", "content": "State the final answer to the following arithmetic problem: 84 - 12 ="}
    ],
    "functions": [
        {"role": "system", "content": tools_text(FORMATS["json_list"], [WEATHER])},
        {"role": "user", "content": "What is the weather in Oslo, in celsius?"},
    ],
    "reader": [
        {
            "role": "user",
            "content": "Simon waves away skateboarding. Cosmo celebrates playing the trumpet. Travis endorses ultimate "
            "frisbee. \nWho endorses ultimate frisbee? Reply only with a name.",
        }
    ],
}
ANSWERS = {
    "arithmetic": "72",
    "functions": '[{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "celsius"}}]',
    "reader": "Travis",
}


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def served(smollm2_gguf, tmp_path_factory):
    # Few shapes: with none cached, the default's take two minutes to compile behind the tests' backs.
    few = {"batch": {"prefill_tokens": 64, "decode_rows": 1}, "kv": {"pages": 128}}
    tasks = {"chat": "base"} | {name: ROOT / "demo" / name for name in ASKED}
    with serving(smollm2_gguf, tasks, tmp_path_factory.mktemp("smollm2"), **few) as server:
        yield server


def logits_of(reference, ids):
    with torch.inference_mode():
        return reference(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_logits_equal_transformers(served, reference, kind):
    # Natural text: on random tokens transformers' own float32 logits are 4e-4 away from its float64 ones.
    tokenizer = served.shared.model.tokenizer
    chat = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    ids = chat if kind == "chat" else tokenizer.encode(TEXT_PROMPT)
    ours = np.asarray(served.shared.model.logits([ids]))[0]
    np.testing.assert_allclose(ours, logits_of(reference, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_64_greedy_tokens_equal_transformers(served, reference, prompt):
    ids = served.shared.model.tokenizer.encode(prompt)
    answer = served.ask(TEXT, prompt=prompt, max_tokens=64)
    assert answer == served.expected("chat", ids, 64)
    # One forward over prompt and answer: if each token is the best one after those before it, greedy decoding gives it.
    new = served.generate("chat", ids, 64)
    logits = logits_of(reference, ids + new)[len(ids) - 1 : -1]
    assert np.diff(np.sort(logits, axis=1)[:, -2:]).min() > 1e-4, "draw another prompt"
    assert logits.argmax(axis=1).tolist() == new


def test_transformers_own_loop(served, reference):
    ids = served.shared.model.tokenizer.encode(PROMPTS[0])
    with torch.inference_mode():
        theirs = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].tolist()
    assert served.generate("chat", ids, 64) == theirs


def test_paris(served):
    text, reason, _ = served.ask(CHAT, messages=[{"role": "user", "content": QUESTION}])
    assert "Paris" in text
    assert reason == "stop"


@pytest.mark.parametrize("task", ASKED)
def test_the_demo_modules_answer_as_in_the_plain_loop(served, task):
    """README's questions, which the base does not answer so."""
    ids = served.shared.model.tokenizer.encode_chat(ASKED[task])
    answer = served.ask(CHAT, model=task, messages=ASKED[task], max_tokens=40)
    assert answer[:2] == (ANSWERS[task], "stop")
    assert answer == served.expected(task, ids, 40)
    assert served.ask(CHAT, messages=ASKED[task], max_tokens=40)[0] != ANSWERS[task]
