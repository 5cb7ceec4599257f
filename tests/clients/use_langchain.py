"""langchain-openai: a chat with two system messages, whole and streamed, with usage, and as a batch."""

import json
import sys

from langchain_openai import ChatOpenAI

url, task = sys.argv[1:]
model = ChatOpenAI(model=task, base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=12, stream_usage=True)
messages = [("human", "hello, who are you today?")]
whole = model.invoke(messages)
streamed = list(model.stream(messages))
batch = model.batch([messages, [("system", "a"), ("system", "b"), ("human", [{"type": "text", "text": "hi"}])]])
print(
    json.dumps(
        {
            "whole": whole.content,
            "streamed": "".join(part.content for part in streamed),
            "usage": whole.usage_metadata["input_tokens"],
            "stream_usage": sum((part.usage_metadata or {}).get("input_tokens", 0) for part in streamed),
            "batch": [message.content for message in batch],
        }
    )
)
