"""How many programs XLA has compiled in this process: what a warmed-up server must not do any more."""

import functools

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts compilations (also those that the persistent cache answers) and the seconds they took."""

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0

    def note(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Called by JAX for every measured event."""
        if event == _EVENT:
            self.count += 1
            self.seconds += duration_secs


@functools.cache
def compile_counter() -> CompileCounter:
    """The process's counter; counting begins with the first call."""
    counter = CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(counter.note)
    return counter
