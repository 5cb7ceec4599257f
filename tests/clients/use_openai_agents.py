"""openai-agents by /v1/responses, its default, and by chats: `python use_openai_agents.py URL free|forced`."""

import asyncio
import sys

from agents import (
    Agent,
    ModelSettings,
    Runner,
    function_tool,
    set_default_openai_api,
    set_default_openai_client,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from two_tools import QUESTION, SYSTEM, TOOLS, Total, ran, report

GREEDY = {"temperature": 0, "max_tokens": 128}
tools = [function_tool(tool) for tool in TOOLS]


def agent(task, **settings):
    return Agent(name=task, model=task, instructions=SYSTEM, **settings)


async def free():
    """The whole loop, streamed too, on a growing context; a typed answer; a hand-off to the agent of another task."""
    counter = agent("text", tools=tools)
    first = await Runner.run(counter, QUESTION)
    again = Runner.run_streamed(counter, [*first.to_input_list(), {"role": "user", "content": QUESTION}])
    deltas = [event.data.delta async for event in again.stream_events() if is_text(event)]
    together = await Runner.run(agent("together", tools=tools), QUESTION)
    typed = await Runner.run(agent("json", tools=tools, output_type=Total), QUESTION)
    handed = await Runner.run(agent("hand-off", handoffs=[agent("handed", tools=tools)]), QUESTION)
    return {
        "answers": [first.final_output, again.final_output, "".join(deltas), together.final_output],
        "typed": typed.final_output.model_dump(),
        "handed": [handed.last_agent.name, handed.final_output],
    }


async def forced():
    """Two forced calls and a typed answer on one context, by two tasks."""
    context = [{"role": "user", "content": QUESTION}]
    for task, tool in (("one", "get_population"), ("two", "add")):
        settings = ModelSettings(tool_choice=tool, **GREEDY)
        caller = agent(task, tools=tools, model_settings=settings, tool_use_behavior="stop_on_first_tool")
        context = (await Runner.run(caller, context)).to_input_list()
    typed = await Runner.run(agent("one", output_type=Total, model_settings=ModelSettings(**GREEDY)), context)
    return {"typed": typed.final_output.model_dump()}


def is_text(event):
    return event.type == "raw_response_event" and event.data.type == "response.output_text.delta"


async def main(url, scenario):
    set_tracing_disabled(True)
    set_default_openai_client(AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))
    saw = {}
    for api in ("responses", "chat_completions"):
        set_default_openai_api(api)
        ran.clear()
        saw[api] = {**await {"free": free, "forced": forced}[scenario](), "ran": dict(ran)}
    report(**saw)


asyncio.run(main(*sys.argv[1:]))
