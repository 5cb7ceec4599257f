"""Real clients against the real server: `pytest -m clients tests/clients`, in a virtual environment of their own.

PSHARE_CLIENTS_ENV names an environment to use and keep; without it one is made for the run, which takes minutes.
"""

import json
import subprocess
from pathlib import Path

import pytest
from server_process import serving
from tiny import tiny_folder, tiny_module

import pshare_jax as ps

HERE = Path(__file__).parent
TASK = "org/math-v1.5"
MESSAGES = [{"role": "user", "content": "hello, who are you today?"}]
pytestmark = [pytest.mark.clients, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base = tiny_folder("llama", root / "base")
    with serving(base, {"chat": "base", TASK: tiny_module(base, root / "full")}, root) as server:
        yield server


@pytest.fixture(scope="module")
def expected(served):
    """(The prompt's length, the oracle's text)."""
    ids = served.shared.model.tokenizer.encode_chat(MESSAGES)
    return len(ids), served.expected(TASK, ids, 12)[0]


def used(environment, script, served):
    done = subprocess.run(
        [environment / "python", HERE / script, served.url, TASK], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_openai(environment, served, expected):
    length, text = expected
    saw = used(environment, "use_openai.py", served)
    assert saw["models"] == ["chat", TASK]
    assert saw["whole"] == saw["streamed"] == saw["extra"] == text
    assert saw["usage"] == saw["stream_usage"]
    assert saw["usage"][0] == length
    assert (saw["indices"], set(saw["top"])) == ([0, 1, 2], {2})
    tokenizer = served.shared.model.tokenizer
    assert saw["batch"] == [served.expected(TASK, tokenizer.encode(prompt), 5)[0] for prompt in ("one", "two")]
    assert all(1 <= entries <= 12 for entries in saw["entries"])
    assert all(1 <= entries <= 5 for entries in saw["batch_entries"])
    assert saw["errors"] == {
        "model": ["NotFoundError", "model_not_found", "model"],
        "long": ["BadRequestError", "context_length_exceeded", "messages"],
    }


def test_litellm(environment, served, expected):
    length, text = expected
    saw = used(environment, "use_litellm.py", served)
    assert saw["texts"] == {"openai": [text, text], "hosted_vllm": [text, text]}
    assert saw["usage"] == length
    assert saw["error"] == "ContextWindowExceededError"


def test_langchain(environment, served, expected):
    length, text = expected
    saw = used(environment, "use_langchain.py", served)
    assert saw["whole"] == saw["streamed"] == saw["batch"][0] == text
    assert saw["usage"] == saw["stream_usage"] == length


def test_lm_eval(environment, served):
    """Cases of clients.md: generations and one-token continuations by lm-eval's own class are the oracle's; so are longer
    continuations by docs/pshare_lm_eval.py, and plain echo scores each token as the first of an answer.
    """
    shared, tokenizer = served.shared, served.shared.model.tokenizer
    plain, ours = used(environment, "use_lm_eval.py", served)
    for samples in (plain, ours):
        for (question, _), text in samples["texts"]:
            expected = served.expected(TASK, tokenizer.encode(question, add_special_tokens=False), 8)[0]
            assert text == expected.split("zz")[0]
    lengths = []
    for (question, choice), (score, greedy) in plain["choices"]:
        ids, start = [tokenizer.encode(text, add_special_tokens=False) for text in (question + choice, question)]
        start = len(start)
        lengths.append(len(ids) - start)
        firsts = [(first(shared, ids[: end + 1]), best(shared, ids[:end])) for end in range(start, len(ids))]
        assert score == pytest.approx(sum(logprob for logprob, _ in firsts), abs=1e-4 * len(firsts))
        assert greedy == all(best == token for (_, best), token in zip(firsts, ids[start:], strict=True))
        begun = next(answer for args, answer in ours["choices"] if args == [question, choice])
        expected = sum(one or 0.0 for one in ps.score(shared, TASK, ids, response_start=start)[start:])
        assert begun[0] == pytest.approx(expected, abs=1e-4 * len(firsts))
        if len(firsts) == 1:
            assert begun == pytest.approx([score, greedy], abs=1e-4)
    assert min(lengths) == 1
    assert max(lengths) > 2


def first(shared, ids):
    """The last id's log-probability as the first of an answer."""
    (logprob,) = ps.score(shared, TASK, ids, response_start=len(ids) - 1)[-1:]
    return logprob or 0.0


def best(shared, ids):
    return ps.generate(shared, TASK, ids, max_new_tokens=1)[0]


def test_schemathesis(environment, tmp_path):
    base = tiny_folder("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 256}))
    with serving(base, {"chat": "base"}, tmp_path) as server:
        command = [environment / "python", HERE / "use_schemathesis.py", server.url, "1300"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    statuses = json.loads(done.stdout.splitlines()[-1])
    print(statuses)
    assert sum(sum(counts.values()) for counts in statuses.values()) >= 5000
    assert not any(int(status) >= 500 for counts in statuses.values() for status in counts)
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert statuses[f"POST {path}"].get("200", 0) >= 50


def test_aiperf(environment, served, tmp_path):
    """Its own tokenizer is the base's folder; 12 streamed chats, three at a time."""
    command = [
        *(environment / "aiperf", "profile", "--model", TASK, "--url", served.url, "--endpoint-type", "chat"),
        *("--streaming", "--concurrency", "3", "--request-count", "12", "--synthetic-input-tokens-mean", "60"),
        *("--output-tokens-mean", "16", "--extra-inputs", "ignore_eos:true", "--tokenizer", tmp_path / "base"),
        *("--output-artifact-dir", tmp_path / "out", "--ui", "none"),
    ]
    (tmp_path / "base").symlink_to(served.output.parent / "base")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (result,) = (tmp_path / "out").rglob("profile_export_aiperf.json")
    figures = json.loads(result.read_text())
    assert figures["request_count"]["avg"] == 12
    assert figures["time_to_first_token"]["avg"] > 0
