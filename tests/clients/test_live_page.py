"""The live page in headless Chromium (Debian's, driven by Playwright) against the real server on a tiny model."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from server_process import CHAT, serving
from tiny import tiny_folder, tiny_module

HERE = Path(__file__).parent
TASKS = ["chat", "org/math-v1.5", "<img src=x onerror=alert(1)>"]
PROMPT = "hello, who are you today? " * 4
KEY = "sécret key"
pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def browse(environment):
    """Runs a scenario of use_browser.py and returns its observations."""
    python, chromium = environment / "python", shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is missing: apt-get install chromium")
    if subprocess.run([python, "-c", "import playwright"], capture_output=True, check=False).returncode:
        pytest.skip(f"playwright is missing: {environment / 'pip'} install playwright")

    def run(scenario, url, *needs):
        command = [python, HERE / "use_browser.py", scenario, url, chromium, *map(json.dumps, needs)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny base, and a full decode module for it."""
    root = tmp_path_factory.mktemp("models")
    folder = tiny_folder("llama", root / "base", max_position_embeddings=8192)
    return folder, tiny_module(folder, root / "full")


def test_one_prompt_to_several_tasks(browse, base, tmp_path):
    modules = {TASKS[0]: "base", TASKS[1]: base[1], TASKS[2]: "base"}
    with serving(base[0], modules, tmp_path) as server:
        saw = browse("ask", server.url, PROMPT, TASKS, 12)
        ids = server.shared.model.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
        asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}
        whole = {task: server.ask(CHAT, model=task, **asked) for task in TASKS}
        live = server.client.get("/live").json()
    # Names are shown verbatim, even if they look like HTML.
    assert [name.strip() for name in saw["offered"]] == [row[0] for row in saw["tasks"]] == TASKS
    assert saw["empty_sessions"][0][0].startswith("No session")
    assert saw["before"] == "≈ 0 s"
    # The answers equal those of the API and the oracle; all but one reused every full page.
    assert set(saw["cards"]) == set(TASKS)
    cached = []
    for task, (state, text, figures) in saw["cards"].items():
        assert (text, figures["answer tokens"]) == (whole[task][0], str(whole[task][2]))
        assert text == server.expected(task, ids, 12)[0]
        assert state == {"length": "token limit", "stop": "done"}[whole[task][1]]
        assert figures["first token"].endswith(" ms")
        assert float(figures["tokens/s"]) > 0
        hit, prompt = figures["cached / prompt tokens"].split(" / ")
        assert int(prompt) == len(ids)
        cached.append(int(hit))
    full = (len(ids) - 1) // 16 * 16
    assert sorted(cached) == [0, full, full]
    assert saw["side_by_side"]
    assert saw["note"].startswith(f"{2 * full} of {3 * len(ids)} prompt tokens of 3 answers")
    # The board, after these three answers.
    assert all("last 10 minutes: median" in saw[chart] for chart in ("chart", "other_chart"))
    assert saw["chart"] != saw["other_chart"]
    prefilled = 3 * (len(ids) - 1) - 2 * full
    assert saw["bars"][0] == f"since the start: {prefilled} prefilled · {2 * full} reused"
    assert [text.split(":")[0] for text in saw["bars"][1:]] == [pool["name"] for pool in live["pools"]]
    assert saw["reused"] == f"{2 * full} reused, {prefilled} prefilled (counted)"
    assert saw["saved"].startswith("≈ ")
    assert [row[3] for row in saw["tasks"]] == ["1", "1", "1"]
    (session,) = saw["sessions"]
    assert session[2:5] == ["3", str(3 * len(ids)), f"{2 * full} ({100 * 2 * full / (3 * len(ids)):.1f} %)"]
    # Errors show the API's message.
    assert "context" in server_message(saw["refused"])
    # The page sent requests to this server alone, and no unexpected error occurred.
    clean = saw["clean"]
    assert {url.split("/", 3)[2] for url in clean["requests"] if not url.startswith("data:")} == {server.url[7:]}
    assert clean["exceptions"] == []
    assert [text for text in clean["console"] if "400 (Bad Request)" not in text] == []
    assert saw["overflow"] <= 0
    assert saw["elsewhere"] == "TypeError"
    assert saw["violations"]


def test_answers_are_stopped(browse, base, tmp_path):
    modules = {"one": "base", "two": "base"}
    with serving(base[0], modules, tmp_path) as server:
        saw = browse("stop", server.url, PROMPT, 7000)
        limit = time.monotonic() + 10
        tasks = server.client.get("/live").json()["tasks"]
        while any(task["running"] for task in tasks):
            assert time.monotonic() < limit, "an answer still runs after the stop"
            tasks = server.client.get("/live").json()["tasks"]
        ended = {task["name"]: task["ended"]["aborted"] for task in tasks}
    assert saw["exceptions"] == []
    assert set(saw["cards"]) == set(modules)
    assert {state for state, *_ in saw["cards"].values()} == {"stopped"}
    assert all(text and float(figures["answer tokens"]) > 0 for _, text, figures in saw["cards"].values())
    assert ended == dict.fromkeys(modules, 1)


def server_message(cards):
    """The common message of refused answers."""
    assert {state for state, *_ in cards.values()} == {"error"}
    (message,) = {text for _, text, _ in cards.values()}
    return message


def test_the_key_is_requested(browse, base, tmp_path):
    with serving(base[0], {"chat": "base"}, tmp_path, server={"api_key": KEY}) as server:
        saw = browse("key", server.url, KEY)
    assert (saw["first"], saw["board"]) == ("This server needs its API key.", False)
    assert saw["wrong"] == "The server refused this key."
    assert [row[0] for row in saw["tasks"]] == ["chat"]
    assert saw["cards"]["chat"][2]["answer tokens"] in {"1", "2", "3", "4"}
    assert saw["forgotten"] == ["This server needs its API key.", 0]
    assert not saw["in_url"]
    assert saw["exceptions"] == []
    assert [text for text in saw["console"] if "401 (Unauthorized)" not in text] == []


def test_an_outage_is_reported_and_recovered_from(browse, base, tmp_path):
    with serving(base[0], {"chat": "base"}, tmp_path) as server:
        saw = browse("outage", server.url)
    assert saw["trouble"].startswith(server_message(saw["cards"]))
    assert saw["state"] == "unreachable"
    assert saw["after"] == "live"
    assert saw["exceptions"] == []
