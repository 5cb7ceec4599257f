"""Benchmark scripts: each measures one claim of the README against a baseline in the same run and prints a table."""
