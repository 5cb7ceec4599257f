"""litellm with tools: two forced calls, the second one streamed, and a typed answer, with both provider prefixes."""

import json
import sys

import litellm
from two_tools import QUESTION, TOOLS, Total, report

(url,) = sys.argv[1:]
run = {tool.__name__: tool for tool in TOOLS}
city, number = {"enum": ["Paris", "Rome"]}, {"type": "integer", "enum": [1, 2, 3]}
PROPERTIES = {"get_population": {"city": city}, "add": {"a": number, "b": number}}
FUNCTIONS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": of, "required": [*of]}},
    }
    for name, of in PROPERTIES.items()
]


def ask(model, messages, **settings):
    server = {"api_base": f"{url}/v1", "api_key": "none"}
    return litellm.completion(model=model, messages=messages, temperature=0, max_tokens=128, **server, **settings)


saw = {}
for prefix in ("openai", "hosted_vllm"):
    messages = [{"role": "user", "content": QUESTION}]
    for task, name in (("one", "get_population"), ("two", "add")):
        forced = {"tools": FUNCTIONS, "tool_choice": {"type": "function", "function": {"name": name}}}
        answer = ask(f"{prefix}/{task}", messages, **forced, stream=name == "add")
        if name == "add":
            answer = litellm.stream_chunk_builder([*answer])
        (made,) = answer.choices[0].message.tool_calls
        result = run[made.function.name](**json.loads(made.function.arguments))
        messages += [answer.choices[0].message.model_dump(exclude_none=True)]
        messages += [{"role": "tool", "tool_call_id": made.id, "content": str(result)}]
    typed = ask(f"{prefix}/one", messages, response_format=Total).choices[0].message.content
    saw[prefix] = Total.model_validate_json(typed).model_dump()
report(typed=saw)
