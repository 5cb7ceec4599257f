"""OpenAI's Responses API: its bodies become chats, and the engine's events become its items and stream events.

Pure host code like `server.openai`, on which it is built: limits, checks, prompts and sampling are those of a chat. Nothing is
stored, so a client sends all items of a conversation with each call.
"""
