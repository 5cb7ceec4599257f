"""Scores of decode modules on tasks with verifiers."""
