"""Experiments whose results are in the docs. Each is a command that can be resumed and repeated."""
