"""autogen's AssistantAgent with tools, whole and streamed, and with a typed answer: `python use_autogen.py URL free|forced`."""

import asyncio
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient
from two_tools import QUESTION, TOOLS, Total, report

INFO = {
    "vision": False,
    "function_calling": True,
    "json_output": True,
    "structured_output": True,
    "family": "unknown",
    "multiple_system_messages": True,
}


def model(url, task, **settings):
    return OpenAIChatCompletionClient(model=task, base_url=f"{url}/v1", api_key="none", model_info=INFO, **settings)


async def free(url):
    answers = []
    for task, streams in (("text", False), ("text", True), ("together", False)):
        settings = {"max_tool_iterations": 3, "model_client_stream": streams}
        agent = AssistantAgent("counter", model(url, task), tools=TOOLS, **settings)
        answers.append((await agent.run(task=QUESTION)).messages[-1].content)
    return {"answers": answers}


async def forced(url):
    agent = AssistantAgent("typed", model(url, "one", temperature=0, max_tokens=128), output_content_type=Total)
    return {"typed": (await agent.run(task=QUESTION)).messages[-1].content.model_dump()}


url, scenario = sys.argv[1:]
report(**asyncio.run({"free": free, "forced": forced}[scenario](url)))
