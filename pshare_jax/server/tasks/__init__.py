"""Tasks that clients load, replace and unload at run time.

`api` has the endpoints (app.py adds them), `table` makes the changes one at a time in its own thread, `loader` loads and
compiles the weights and is the only module here that uses devices; startup.py builds the last two. A change of the served
tasks happens under `engine.lock`; loading and compiling happen before, without it.
"""
