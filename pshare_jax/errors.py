"""The one exception type for mistakes that a user can make.

Its message is one sentence: what is wrong, what is allowed, what to do. Command-line entry points print it and exit
with status 2; the server returns it as an OpenAI error object.
"""


class PshareError(Exception):
    """A user's mistake (a wrong file, key, name or size), described in one sentence."""
