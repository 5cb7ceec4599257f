"""Benchmarks of the library, each measured against a baseline in the same run; not part of the wheel.

Run from the repository's root, for example `python -m benchmarks.serving`; docs/benchmarks.md has the results. They may
import every room, and nothing imports them. They use the engine's public calls except where a single step is timed: the
benchmark then steps a worker itself, while no worker thread runs.
"""
