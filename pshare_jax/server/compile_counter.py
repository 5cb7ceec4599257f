"""Counts the programs that XLA has compiled in this process; a warmed-up server must compile none."""

import functools
from dataclasses import dataclass


@dataclass
class CompileCounter:
    """The number of compilations (including hits in the persistent cache) and their seconds."""

    count: int = 0
    seconds: float = 0.0

    def note(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Called by JAX for every measured event."""
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += duration_secs


compile_counter = functools.cache(CompileCounter)
"""The process's counter, which stays at zero until `count_compilations`."""


@functools.cache
def count_compilations() -> CompileCounter:
    """The process's counter; counting begins with the first call."""
    # Imported here: the server's metrics read the counter on a Python without JAX too.
    import jax

    jax.monitoring.register_event_duration_secs_listener(compile_counter().note)
    return compile_counter()
