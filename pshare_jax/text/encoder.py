"""What the server needs of a tokenizer, and the error for prompts that are too long. `Tokenizer` is an `Encoder`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tool_format import ToolFormat

PLAIN = ChatStyle()


class PromptTooLong(PshareError):
    """A prompt has at least `least` tokens, as its text's length alone shows."""

    def __init__(self, least: int) -> None:
        super().__init__(f"The prompt has at least {least} tokens, which is too long; shorten it.")
        self.least = least


@runtime_checkable
class Encoder(Protocol):
    """What the server needs of a tokenizer; a prompt that cannot be encoded is a PshareError. See `Tokenizer`."""

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """Texts of the named control tokens, such as `eos_token`."""
        ...

    @property
    def special_ids(self) -> Collection[int]:
        """Ids of the control tokens."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        ...

    def encode(
        self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True, refuse_from: int | None = None
    ) -> list[int]:
        """Ids of a text prompt."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        refuse_from: int | None = None,
        style: ChatStyle = PLAIN,
    ) -> list[int]:
        """Ids of a chat's prompt."""
        ...

    def encode_begun(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        refuse_from: int | None = None,
        style: ChatStyle = PLAIN,
    ) -> tuple[list[int], int | None]:
        """Ids of a chat whose last message is a begun answer, and where that begins."""
        ...

    def tool_format(self, style: ChatStyle = PLAIN) -> ToolFormat | None:
        """How answers of this style write calls."""
        ...

    def turn_ends(self, style: ChatStyle = PLAIN) -> frozenset[int]:
        """Tokens that end answers of this style, besides the model's."""
        ...
