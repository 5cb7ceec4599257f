"""Benchmarks, each with its baseline in the same run; run from the repository's root, such as `python -m benchmarks.serving`."""
