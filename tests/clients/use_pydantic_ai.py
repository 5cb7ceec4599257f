"""pydantic-ai by chats and by /v1/responses, with its four kinds of output: `python use_pydantic_ai.py URL free|forced`."""

import asyncio
import sys

from pydantic_ai import Agent, NativeOutput, PromptedOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from two_tools import QUESTION, SYSTEM, TOOLS, Total, ran, report

OUTPUTS = {
    "text": ("text", str),
    "tool": ("final_result", Total),
    "native": ("json", NativeOutput(Total)),
    "prompted": ("json", PromptedOutput(Total)),
}


def plain(output):
    return output if isinstance(output, str) else output.model_dump()


async def free(model):
    """The whole loop for each kind of output, whole and streamed; two calls in one answer."""
    saw = {}
    for name, (task, output) in OUTPUTS.items():
        agent = Agent(model(task), output_type=output, system_prompt=SYSTEM, tools=TOOLS)
        whole = await agent.run(QUESTION)
        async with agent.run_stream(QUESTION) as stream:
            streamed = await stream.get_output()
        saw[name] = [plain(whole.output), plain(streamed)]
    together = Agent(model("together"), system_prompt=SYSTEM, tools=TOOLS)
    return {**saw, "together": (await together.run(QUESTION)).output}


async def forced(model):
    """Typed answers without tools, by the default (a forced call) and by the server's schema."""
    saw = {}
    for name in ("tool", "native"):
        agent = Agent(model("one"), output_type=OUTPUTS[name][1], system_prompt=SYSTEM)
        settings = {"temperature": 0, "max_tokens": 128, "parallel_tool_calls": False}
        saw[name] = plain((await agent.run(QUESTION, model_settings=settings)).output)
    return saw


async def main(url, scenario):
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    saw = {}
    for api, kind in (("chat", OpenAIChatModel), ("responses", OpenAIResponsesModel)):
        ran.clear()
        run = {"free": free, "forced": forced}[scenario]
        saw[api] = {**await run(lambda task, kind=kind: kind(task, provider=provider)), "ran": dict(ran)}
    report(**saw)


asyncio.run(main(*sys.argv[1:]))
