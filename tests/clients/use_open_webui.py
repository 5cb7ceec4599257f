"""Open WebUI's own server between a browser and ours: the page of models, its tool loop, and two models in one chat.

`python use_open_webui.py FREE_URL SERVED_URL FOLDER`, by the Python of an environment with open-webui. It calls what the page in
the browser calls, and reads the answers from the chats that Open WebUI stores.
"""

import inspect
import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import httpx
from two_tools import QUESTION, add, get_population


@contextmanager
def running(urls, folder, port="8911"):
    """A client of Open WebUI, which keeps its data in the folder and needs nothing from other hosts."""
    settings = {
        "DATA_DIR": str(folder),
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "none",
        "OPENAI_API_BASE_URLS": ";".join(f"{url}/v1" for url in urls),
        "OPENAI_API_KEYS": ";".join("none" for _ in urls),
        "ENABLE_OLLAMA_API": "False",
        "RAG_EMBEDDING_ENGINE": "openai",
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
    }
    program = Path(sys.executable).parent / "open-webui"
    with (Path(folder) / "open-webui.log").open("w") as log:
        command = [program, "serve", "--host", "127.0.0.1", "--port", port]
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_for(lambda: answers(client), 540)
            token = client.post("/api/v1/auths/signin", json={"email": "a@b.c", "password": "none"}).json()["token"]
            client.headers["authorization"] = f"Bearer {token}"
            yield client
    finally:
        process.terminate()
        process.wait()


def answers(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(ready, seconds):
    limit = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < limit, "Open WebUI does not answer"
        time.sleep(0.5)
    return found


def chat(client, models, **fields):
    """A new chat's answers by model."""
    ids = {model: str(uuid.uuid4()) for model in models}
    user = {
        "id": str(uuid.uuid4()),
        "parentId": None,
        "role": "user",
        "content": QUESTION,
        "timestamp": int(time.time()),
    }
    body = {
        "model": models[0],
        "stream": True,
        "messages": [{"role": "user", "content": QUESTION}],
        "parent_id": None,
        "session_id": "none",
        "user_message": user,
        "message_ids": [{"model_id": model, "message_id": name} for model, name in ids.items()],
        **fields,
    }
    started = client.post("/api/chat/completions", json=body).raise_for_status().json()

    def ended():
        chat = client.get(f"/api/v1/chats/{started['chat_id']}").json()["chat"]
        found = {model: chat["history"]["messages"][name] for model, name in ids.items()}
        return found if all(message.get("done") for message in found.values()) else None

    return wait_for(ended, 180)


def tools_source():
    """The two tools as Open WebUI takes them, methods of a class; they need no counter, since the chat keeps the calls."""
    methods = []
    for tool in (get_population, add):
        lines = [line for line in inspect.getsource(tool).splitlines() if "ran[" not in line]
        methods += ["    @staticmethod", *(f"    {line}" for line in lines), ""]
    return "\n".join(
        [
            "from typing import Literal",
            'City = Literal["Paris", "Rome"]',
            "Number = Literal[1, 2, 3]",
            "class Tools:",
            *methods,
        ]
    )


def main(free, served, folder):
    with running([free, served], folder) as client:
        models = [model["id"] for model in client.get("/api/models").json()["data"]]
        tool = {"id": "two_tools", "name": "two tools", "content": tools_source(), "meta": {"description": ""}}
        client.post("/api/v1/tools/create", json=tool).raise_for_status()
        looped = chat(client, ["text"], tool_ids=["two_tools"], params={"function_calling": "native"})["text"]
        together = chat(
            client, ["one", "two"], params={"function_calling": "legacy", "temperature": 0, "max_tokens": 12}
        )
    calls = [item for item in looped["output"] if item["type"] == "function_call"]
    results = [item for item in looped["output"] if item["type"] == "function_call_output"]
    saw = {
        "models": models,
        "question": QUESTION,
        "answer": looped["content"],
        "calls": [[call["name"], json.loads(call["arguments"])] for call in calls],
        "results": ["".join(part["text"] for part in result["output"]) for result in results],
        "together": {model: message["content"] for model, message in together.items()},
    }
    print(json.dumps(saw))


main(*sys.argv[1:])
