"""Agent frameworks, each with two tools: `pytest -m clients tests/clients/test_agents.py` (environment: test_clients.py).

A model with random weights never begins a call by itself. So what the server forces - calls, typed answers - runs on the
real server with such a model. Whole loops with free choice run on the real HTTP server and engine with a scripted stand-in
for the weights (scripted.py), which says what a well-trained module would say.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import scripted
from scripted import ANSWER, TOTAL
from server_process import serving
from tiny import tiny_folder, tiny_module

from pshare_jax.text.chat_style import ChatStyle

HERE = Path(__file__).parent
TASKS = ("one", "two", "three")
CITIES, NUMBERS = {"Paris", "Rome"}, {1, 2, 3, None}
pytestmark = [pytest.mark.clients, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """The address of a server whose scripted tasks choose freely."""
    with scripted.serving(tmp_path_factory.mktemp("scripted")) as url:
        yield url


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The real server on a tiny base of random weights: three tasks, and the same with the layout `last`."""
    root = tmp_path_factory.mktemp("served")
    base = tiny_folder("qwen3", root / "base", max_position_embeddings=4096)
    tasks = {"one": "base", "two": str(tiny_module(base, root / "full")), "three": "base"}
    last = {f"last {name}": {"module": source, "layout": {"system": "last"}} for name, source in tasks.items()}
    with serving(base, {**tasks, **last}, root) as server:
        yield server


def used(environment, script, *needs, seconds=300):
    """What a script saw, by its last line."""
    settings = {**os.environ, "OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [environment / "python", HERE / script, *needs], capture_output=True, text=True, timeout=seconds, env=settings
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def times(count):
    """Executions if each of the two tools ran so often."""
    return {"get_population": count, "add": count}


def is_total(value):
    return set(value) == set(TOTAL) and value["city"] in CITIES and value["total"] in NUMBERS


def test_openai_tools(environment, served):
    saw = used(environment, "use_openai_tools.py", served.url)
    chat, responses = saw["chat"], saw["responses"]
    assert saw["ran"] == times(2)
    assert chat["reasons"] == ["tool_calls"] * 2
    assert chat["agree"] == responses["agree"] == [True, True]
    assert is_total(chat["typed"])
    assert is_total(responses["typed"])
    # The last turn of the other endpoint has the same context, and the answer is the oracle's.
    assert chat["answer"] == responses["answer"]
    ids = served.shared.model.tokenizer.encode_chat(chat["messages"], tools=saw["tools"])
    assert chat["length"] == responses["length"] == len(ids)
    assert chat["answer"] == served.expected("one", ids, 12)[0]
    assert responses["cached"] == (len(ids) - 1) // 16 * 16
    # The second task reads on where the first one called.
    (first, _), (second, cached) = chat["usage"]
    assert (first - 1) // 16 * 16 - 32 <= cached < second


def test_openai_agents_free(environment, free):
    saw = used(environment, "use_openai_agents.py", free, "free")
    for api in ("responses", "chat_completions"):
        assert saw[api] == {
            "answers": [ANSWER] * 4,
            "typed": TOTAL,
            "handed": ["handed", ANSWER],
            "ran": times(5),
        }


def test_openai_agents_forced(environment, served):
    saw = used(environment, "use_openai_agents.py", served.url, "forced")
    for api in ("responses", "chat_completions"):
        assert saw[api]["ran"] == times(1)
        assert is_total(saw[api]["typed"])


def test_pydantic_ai_free(environment, free):
    saw = used(environment, "use_pydantic_ai.py", free, "free")
    for api in ("chat", "responses"):
        assert saw[api] == {
            "text": [ANSWER] * 2,
            **dict.fromkeys(("tool", "native", "prompted"), [TOTAL] * 2),
            "together": ANSWER,
            "ran": times(9),
        }


def test_pydantic_ai_forced(environment, served):
    saw = used(environment, "use_pydantic_ai.py", served.url, "forced")
    assert all(is_total(saw[api][output]) for api in ("chat", "responses") for output in ("tool", "native"))


def test_langgraph_free(environment, free):
    saw = used(environment, "use_langgraph.py", free, "free")
    assert saw["answers"] == [ANSWER] * 3
    assert saw["typed"] == TOTAL
    assert saw["reasons"] == ["tool_calls", "tool_calls", "stop"]
    assert saw["structured"] == dict.fromkeys(("function_calling", "json_mode", "json_schema"), TOTAL)
    assert saw["ran"] == times(4)


def test_langgraph_forced(environment, served):
    saw = used(environment, "use_langgraph.py", served.url, "forced")
    assert saw["reasons"] == ["tool_calls"] * 2
    assert all(map(is_total, saw["structured"].values()))
    assert saw["ran"] == times(1)


def test_instructor_free(instructor_environment, free):
    saw = used(instructor_environment, "use_instructor.py", free, "free")
    assert saw == {"ran": {}, **dict.fromkeys(("JSON", "MD_JSON", "PARALLEL_TOOLS"), TOTAL)}


def test_instructor_forced(instructor_environment, served):
    saw = used(instructor_environment, "use_instructor.py", served.url, "forced")
    assert saw.pop("ran") == {}
    assert set(saw) == {"TOOLS", "TOOLS_STRICT", "FUNCTIONS", "JSON_SCHEMA", "RESPONSES_TOOLS", "partial"}
    assert all(map(is_total, saw.values()))


def test_litellm_tools(environment, served):
    saw = used(environment, "use_litellm_tools.py", served.url)
    assert saw["ran"] == times(2)
    assert all(map(is_total, saw["typed"].values()))


def test_smolagents(environment, free):
    saw = used(environment, "use_smolagents.py", free, "final_answer")
    assert saw == {"ran": times(2), "answers": [ANSWER] * 2, "errors": []}


def test_autogen_free(environment, free):
    saw = used(environment, "use_autogen.py", free, "free")
    assert saw == {"ran": times(3), "answers": [ANSWER] * 3}


def test_autogen_forced(environment, served):
    assert is_total(used(environment, "use_autogen.py", served.url, "forced")["typed"])


def test_open_webui(free, served, tmp_path):
    """PSHARE_OPEN_WEBUI names the folder of an environment that has it (2.4 GB)."""
    folder = os.environ.get("PSHARE_OPEN_WEBUI")
    if folder is None:
        pytest.skip("PSHARE_OPEN_WEBUI names no environment with open-webui")
    saw = used(Path(folder) / "bin", "use_open_webui.py", free, served.url, str(tmp_path), seconds=800)
    assert saw["models"] == [*scripted.SCRIPTS, *TASKS, *(f"last {name}" for name in TASKS)]
    assert saw["calls"] == [["get_population", {"city": "Rome"}], ["add", {"a": 3, "b": 1}]]
    assert (saw["results"], saw["answer"]) == (["3", "4"], ANSWER)
    ids = served.shared.model.tokenizer.encode_chat([{"role": "user", "content": saw["question"]}])
    assert saw["together"] == {task: served.expected(task, ids, 12)[0].strip() for task in ("one", "two")}


@pytest.mark.parametrize("system", ["first", "last"])
def test_agents_share_a_context(environment, served, system):
    """Of the prompt tokens after the first call, three agents in two rounds reuse most if their layout is `last`."""
    prefix = "last " if system == "last" else ""
    calls = used(environment, "use_shared_context.py", served.url, *(f"{prefix}{name}" for name in TASKS))
    encode = served.shared.model.tokenizer.encode_chat
    for task, messages, text, length, _ in calls:
        ids = encode(messages, style=ChatStyle(system=system))
        assert (length, text) == (len(ids), served.expected(task, ids, 12)[0])
    lengths, cached = zip(*(call[3:] for call in calls), strict=True)
    share = sum(cached[1:]) / sum(lengths[1:])
    print(f"layout {system}: prompts {lengths}, cached {cached}, {share:.0%} after the first call")
    if system == "last":
        assert share >= 0.7
    else:
        # Only what the template writes before the system prompt is shared; an agent's second call finds its first.
        assert max(cached[:3]) <= 16
