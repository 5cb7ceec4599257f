"""Experiments whose results are in the docs; not part of the wheel.

Each is a command, run from the repository's root, that can be resumed and repeated. They may import every room, and
nothing imports them; training runs through `training.run`, and accuracy through `evaluation.evaluate`. They hold no
locks: an experiment runs in one thread.
"""
