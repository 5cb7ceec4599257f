"""instructor in its modes for OpenAI's API, with partial and iterable answers: `python use_instructor.py URL free|forced`."""

import sys
from collections.abc import Iterable

import instructor
import openai
from instructor import Mode
from two_tools import QUESTION, Total, report

url, scenario = sys.argv[1:]
FREE = {Mode.JSON: "only json", Mode.MD_JSON: "only fenced", Mode.PARALLEL_TOOLS: "only Total"}
FORCED = [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.FUNCTIONS, Mode.JSON_SCHEMA, Mode.RESPONSES_TOOLS]
MESSAGES = [{"role": "user", "content": QUESTION}]


def client(mode):
    return instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode)


def ask(mode, task, model=Total, **settings):
    create = client(mode).chat.completions.create
    found = create(model=task, messages=MESSAGES, response_model=model, max_retries=0, **settings)
    (answer,) = [found] if isinstance(found, Total) else found
    return answer.model_dump()


def free():
    return {
        mode.name: ask(mode, task, Iterable[Total] if mode is Mode.PARALLEL_TOOLS else Total)
        for mode, task in FREE.items()
    }


def forced():
    saw = {}
    for mode in FORCED:
        limit = "max_output_tokens" if mode is Mode.RESPONSES_TOOLS else "max_tokens"
        saw[mode.name] = ask(mode, "one", temperature=0, **{limit: 128})
    partial = client(Mode.TOOLS).chat.completions.create_partial(
        model="one", messages=MESSAGES, response_model=Total, max_retries=0, temperature=0, max_tokens=128
    )
    return {**saw, "partial": list(partial)[-1].model_dump()}


report(**{"free": free, "forced": forced}[scenario]())
