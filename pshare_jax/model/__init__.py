"""The decoder of all families: its config, layers and sharding, and the jitted steps over dense and paged KV.

Everything here is a pure function of arrays, or a frozen description of such functions; nothing knows of serving,
training or files. The rooms above import it: weights and share mostly architecture, config and steps, the engine
paged_batch and kv.pages. Nothing here locks; a caller that donates an array must be its only user.
"""
