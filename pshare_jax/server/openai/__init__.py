"""The OpenAI-compatible API: request bodies and their checks, engine requests, response objects, tokenizer endpoints.

Pure host code between JSON and `engine.request.Request`; it never calls the engine. app.py, the task endpoints and tests
call it. It takes no lock: bodies are values, and a `ResponseBuilder` belongs to one call, which runs its methods one at a
time (long ones in a thread, see `maybe_threaded`).
"""
