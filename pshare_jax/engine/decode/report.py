"""Reports what a step has computed for a sequence."""

import logging
from collections.abc import Callable

from pshare_jax.engine.interfaces import EngineHooks
from pshare_jax.engine.request import FAILED, Event
from pshare_jax.engine.sequence import Sequence, State
from pshare_jax.text.grammar import GrammarFailed

logger = logging.getLogger(__name__)


def report(hooks: EngineHooks, sequence: Sequence, make: Callable[[], Event | None]) -> None:
    """Makes and reports an event, if there is one; if the host fails at that, only this sequence fails."""
    try:
        event = make()
        if event is None:
            return
        if event.completion_tokens == 1:
            hooks.first_token(sequence)
        if event.last:
            hooks.end(sequence, State.FINISHED, event)
        else:
            sequence.on_event(event)
    except GrammarFailed as error:
        hooks.end(sequence, State.FAILED, Event(error=str(error), retry=False))
    except Exception:
        logger.exception("the output of request %s failed", sequence.request.id)
        hooks.end(sequence, State.FAILED, Event(error=FAILED, retry=False))
