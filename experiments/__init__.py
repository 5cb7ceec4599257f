"""Experiments whose results the docs print; each can be resumed and redone by its command."""
