"""The real SmolLM2 (GGUF): our logits, the plain loop and the HTTP server against transformers on the same file."""

import numpy as np
import pytest
import torch
from server_process import CHAT, TEXT, serving
from transformers import AutoModelForCausalLM

QUESTION = "What is the capital of France? Answer briefly."
PROMPTS = (
    "The quick brown fox",
    "Once upon a time there was a small village by the sea, where",
    "def fibonacci(n):\n    ",
    "The three primary colours are red,",
    "Water boils at 100 degrees Celsius because",
)


@pytest.fixture(scope="module")
def reference(smollm2_gguf):
    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def served(smollm2_gguf, tmp_path_factory):
    with serving(smollm2_gguf, {"chat": "base"}, tmp_path_factory.mktemp("smollm2")) as server:
        yield server


def logits_of(reference, ids):
    with torch.inference_mode():
        return reference(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("kind", ["random tokens", "chat"])
def test_logits_equal_transformers(served, reference, kind):
    model = served.shared.model
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 128).tolist()
    if kind == "chat":
        ids = model.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    np.testing.assert_allclose(np.asarray(model.logits([ids]))[0], logits_of(reference, ids), atol=1e-4, rtol=0)


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
