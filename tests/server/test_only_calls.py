"""Where one call is allowed, what is cut behind it does not make the answer incomplete."""

import pytest

from pshare_jax.server.openai.messages import ChatMessage
from pshare_jax.server.openai.tools import CallRules
from pshare_jax.text.tool_format import FORMATS

pytestmark = pytest.mark.host
TOOL = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "single", "expected"),
    [
        (f"{CALL}\nand then", True, "tool_calls"),
        (f"{CALL}\nand then", False, "length"),
        (f"{CALL}\n{CALL[:30]}", True, "tool_calls"),
        (CALL[:40], True, "length"),
    ],
)
def test_the_reason_of_a_cut_answer(text, single, expected):
    message = ChatMessage(CallRules([TOOL], single=single), FORMATS["hermes"])
    message.whole(text)
    assert message.finish_reason("length") == expected
