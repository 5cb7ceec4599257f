"""Evaluation: the accuracy of decode modules on tasks with verifiers.

`tasks` opens a task's questions, `verifiers` judge answers, `evaluate` asks an engine and is the command
`pshare-evaluate`. It imports engine, training's data and cards, and share, never server; experiments call it. It takes no
lock: the engine is stepped in the calling thread.
"""
