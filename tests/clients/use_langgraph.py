"""langchain's agent, which runs on langgraph, and its three structured outputs: `python use_langgraph.py URL free|forced`."""

import sys

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_openai import ChatOpenAI
from two_tools import QUESTION, SYSTEM, TOOLS, Total, report

url, scenario = sys.argv[1:]
HUMAN = ("human", QUESTION)


def chat(task, **settings):
    return ChatOpenAI(model=task, base_url=f"{url}/v1", api_key="none", max_retries=0, temperature=0, **settings)


def structured(tasks, **settings):
    """Method -> the typed answer."""
    return {
        method: chat(task, **settings).with_structured_output(Total, method=method).invoke([HUMAN]).model_dump()
        for method, task in tasks.items()
    }


def free():
    """The whole loop, and again on the grown context, streamed; two calls in one answer; a typed answer by a tool."""
    agent = create_agent(chat("text"), tools=TOOLS, system_prompt=SYSTEM)
    first = agent.invoke({"messages": [HUMAN]})["messages"]
    parts = list(agent.stream({"messages": [*first, HUMAN]}, stream_mode="messages"))
    together = create_agent(chat("together"), tools=TOOLS).invoke({"messages": [HUMAN]})["messages"]
    typed = create_agent(chat("Total"), tools=TOOLS, response_format=Total).invoke({"messages": [HUMAN]})
    text = "".join(part.content for part, _ in parts if part.type == "AIMessageChunk")
    return {
        "answers": [first[-1].content, text, together[-1].content],
        "typed": typed["structured_response"].model_dump(),
        "reasons": [message.response_metadata["finish_reason"] for message in first if message.type == "ai"],
        "structured": structured(
            {"function_calling": "only Total", "json_mode": "only json", "json_schema": "only json"}
        ),
    }


def forced():
    """Two forced calls and a free answer on one context; typed answers by a forced call and by a schema."""
    choices = iter(["get_population", "add", "none"])

    @wrap_model_call
    def force(request, handler):
        return handler(request.override(tool_choice=next(choices)))

    model = chat("one", max_tokens=128)
    messages = create_agent(model, tools=TOOLS, system_prompt=SYSTEM, middleware=[force]).invoke({"messages": [HUMAN]})
    reasons = [message.response_metadata["finish_reason"] for message in messages["messages"] if message.type == "ai"]
    tasks = {"function_calling": "one", "json_schema": "two"}
    return {"reasons": reasons[:2], "structured": structured(tasks, max_tokens=128)}


saw = {"free": free, "forced": forced}[scenario]()
report(**saw)
