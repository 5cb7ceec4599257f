"""The one exception type for faults a user can cause.

Raised anywhere in the library with one clear sentence that names the thing and the way out; command-line entry points
print that sentence and exit with status 2, the server turns it into an OpenAI error object.
"""


class PshareError(Exception):
    """A user's mistake (a wrong file, key, name or size), told in one sentence."""
