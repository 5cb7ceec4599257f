"""The HTTP server over the engine: command line, startup, application, middleware and metrics.

The highest room: it may import every other, and only `serve/main.py` and `pshare-serve` call it. Handlers run on uvicorn's
event loop; workers' threads call back through `loop.call_soon_threadsafe`. A consistent read of several engine values needs
`engine.lock`; code under it must neither block nor raise.
"""
