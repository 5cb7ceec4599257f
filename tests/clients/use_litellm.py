"""litellm: a chat with both provider prefixes, whole and streamed, a slash in the name, its context error."""

import json
import sys

import litellm

url, task = sys.argv[1:]
messages = [{"role": "user", "content": "hello, who are you today?"}]
ask = {"messages": messages, "temperature": 0, "max_tokens": 12, "api_base": f"{url}/v1", "api_key": "none"}
texts = {}
for prefix in ("openai", "hosted_vllm"):
    whole = litellm.completion(model=f"{prefix}/{task}", **ask)
    parts = litellm.completion(model=f"{prefix}/{task}", **ask, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts)
    texts[prefix] = [whole.choices[0].message.content, streamed]
try:
    litellm.completion(model=f"openai/{task}", **{**ask, "max_tokens": 10**6}, num_retries=0)
    error = None
except litellm.exceptions.BadRequestError as raised:
    error = type(raised).__name__
print(json.dumps({"texts": texts, "usage": whole.usage.prompt_tokens, "error": error}))
