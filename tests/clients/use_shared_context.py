"""A langgraph of agents, each with a system prompt and a task of its own, who write on one context in turn.

`python use_shared_context.py URL TASK...` prints every call: task, messages, text, prompt tokens, cached tokens.
"""

import json
import sys

from langchain_core.messages import SystemMessage, convert_to_openai_messages
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

url, *tasks = sys.argv[1:]
ROUNDS = 2
NOTES = "The bakery of the village runs at night, and its ovens are warm until noon. " * 10
calls = []


def agent(number, task):
    """A node of the graph that puts its system prompt before the common messages, as frameworks do."""
    model = ChatOpenAI(model=task, base_url=f"{url}/v1", api_key="none", max_retries=0, temperature=0, max_tokens=12)

    def speak(state):
        system = SystemMessage(f"You are agent {number}. Answer in {number} words.")
        messages = [system, *state["messages"]]
        answer = model.invoke(messages)
        usage = answer.usage_metadata
        cached = usage["input_token_details"].get("cache_read", 0)
        calls.append([task, convert_to_openai_messages(messages), answer.content, usage["input_tokens"], cached])
        return {"messages": [answer]}

    return speak


graph = StateGraph(MessagesState)
previous = START
for turn in range(ROUNDS):
    for number, task in enumerate(tasks):
        graph.add_node(f"{turn} {task}", agent(number, task))
        graph.add_edge(previous, previous := f"{turn} {task}")
graph.compile().invoke({"messages": [("human", f"{NOTES}What would you do with the heat?")]})
print(json.dumps(calls))
