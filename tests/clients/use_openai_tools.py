"""The openai SDK with tools: two forced calls and an answer on one context, by chats and by /v1/responses.

`python use_openai_tools.py URL` prints the context that grew, with the answer.
"""

import json
import sys

import openai
from two_tools import QUESTION, SYSTEM, TOOLS, Total, report

(url,) = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
run = {tool.__name__: tool for tool in TOOLS}
city = {"type": "string", "enum": ["Paris", "Rome"]}
number = {"type": "integer", "enum": [1, 2, 3]}


def function(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"name": name, "description": f"Runs {name}.", "parameters": parameters, "strict": True}


FUNCTIONS = [function("get_population", city=city), function("add", a=number, b=number)]
CHAT_TOOLS = [{"type": "function", "function": one} for one in FUNCTIONS]
RESPONSE_TOOLS = [{"type": "function", **one} for one in FUNCTIONS]
STEPS = (("one", "get_population"), ("two", "add"))


def call(name, arguments):
    return str(run[name](**json.loads(arguments)))


def by_chats():
    """The messages, the answer, and the streamed calls, which must be the same."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    ask = {"messages": messages, "tools": CHAT_TOOLS, "temperature": 0, "parallel_tool_calls": False}
    reasons, agree, usage = [], [], []
    for task, name in STEPS:
        chosen = {"model": task, "tool_choice": {"type": "function", "function": {"name": name}}, "max_tokens": 128}
        answer = client.chat.completions.create(**ask, **chosen)
        choice = answer.choices[0]
        usage.append([answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens])
        (made,) = choice.message.tool_calls
        with client.chat.completions.stream(**ask, **chosen) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        agree.append((streamed.function.name, streamed.function.arguments) == (name, made.function.arguments))
        reasons.append(choice.finish_reason)
        result = call(made.function.name, made.function.arguments)
        messages.append(choice.message.to_dict())
        messages.append({"role": "tool", "tool_call_id": made.id, "content": result})
    whole = client.chat.completions.create(**ask, model="one", tool_choice="none", max_tokens=12)
    typed = client.chat.completions.parse(
        model="two", messages=messages[:2], response_format=Total, temperature=0, max_tokens=128
    )
    return {
        "messages": messages,
        "answer": whole.choices[0].message.content,
        "length": whole.usage.prompt_tokens,
        "usage": usage,
        "reasons": reasons,
        "agree": agree,
        "typed": typed.choices[0].message.parsed.model_dump(),
    }


def by_responses():
    items = [{"role": "user", "content": QUESTION}]
    ask = {
        "input": items,
        "instructions": SYSTEM,
        "tools": RESPONSE_TOOLS,
        "temperature": 0,
        "parallel_tool_calls": False,
    }
    agree = []
    for task, name in STEPS:
        chosen = {"model": task, "tool_choice": {"type": "function", "name": name}, "max_output_tokens": 128}
        (made,) = client.responses.create(**ask, **chosen).output
        with client.responses.stream(**ask, **chosen) as stream:
            (streamed,) = stream.get_final_response().output
        agree.append((streamed.name, streamed.arguments) == (name, made.arguments))
        items.append(made.to_dict())
        items.append(
            {"type": "function_call_output", "call_id": made.call_id, "output": call(made.name, made.arguments)}
        )
    whole = client.responses.create(**ask, model="one", tool_choice="none", max_output_tokens=12)
    typed = client.responses.parse(model="two", input=QUESTION, text_format=Total, temperature=0, max_output_tokens=128)
    return {
        "answer": whole.output_text,
        "length": whole.usage.input_tokens,
        "cached": whole.usage.input_tokens_details.cached_tokens,
        "agree": agree,
        "typed": typed.output_parsed.model_dump(),
    }


saw = {"chat": by_chats(), "responses": by_responses()}
report(**saw, tools=CHAT_TOOLS)
