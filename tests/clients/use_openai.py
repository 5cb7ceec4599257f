"""The openai SDK: models, chats and completions, streamed and not, n, logprobs, errors. Prints the results."""

import json
import sys

import openai

url, task = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
messages = [{"role": "user", "content": "hello, who are you today?"}]
ask = {"model": task, "messages": messages, "temperature": 0, "max_tokens": 12}

whole = client.chat.completions.create(**ask)
streamed, usage = "", None
for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    streamed += (chunk.choices[0].delta.content or "") if chunk.choices else ""
several = client.chat.completions.create(**{**ask, "temperature": 1.0}, seed=5, n=3, logprobs=True, top_logprobs=2)
batch = client.completions.create(model=task, prompt=["one", "two"], temperature=0, max_tokens=5, logprobs=1)
extra = client.chat.completions.create(**ask, extra_body={"cache_salt": "s", "top_k": 1, "min_p": 0.0})
errors = {}
for name, wrong in {"model": {**ask, "model": "typo"}, "long": {**ask, "max_tokens": 10**6}}.items():
    try:
        client.chat.completions.create(**wrong)
    except openai.APIStatusError as error:
        errors[name] = [type(error).__name__, error.code, error.param]
print(
    json.dumps(
        {
            "models": [model.id for model in client.models.list()],
            "whole": whole.choices[0].message.content,
            "streamed": streamed,
            "extra": extra.choices[0].message.content,
            "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
            "stream_usage": [usage.prompt_tokens, usage.completion_tokens],
            "indices": [choice.index for choice in several.choices],
            "entries": [len(choice.logprobs.content) for choice in several.choices],
            "top": [len(entry.top_logprobs) for entry in several.choices[0].logprobs.content],
            "batch": [choice.text for choice in batch.choices],
            "batch_entries": [len(choice.logprobs.tokens) for choice in batch.choices],
            "errors": errors,
        }
    )
)
