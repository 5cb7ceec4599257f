"""transfer.py: a way that closes while a copy is being dispatched."""

import pytest

from pshare_jax.serving.output import TextOutput
from pshare_jax.serving.request import Request, Sequence, State
from pshare_jax.serving.transfer import KVTransfer


class Silent:
    """A detokenizer that writes nothing."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Dying:
    """A destination whose worker dies during the copy."""

    def __init__(self):
        self.transfer = KVTransfer(self, lambda: None)

    def place(self, kv):
        self.transfer.close()
        return kv


def test_no_sequence_is_put_on_a_closed_way():
    transfer = Dying().transfer
    sequence = Sequence(Request("r", "t", (1, 2), 1), TextOutput(Silent(), ()), lambda event: None)
    sequence.move(State.PREFILLING)
    with pytest.raises(RuntimeError, match="stopped"):
        transfer.send(sequence)
    assert sequence.state is State.PREFILLING
    assert transfer.in_flight == 0
