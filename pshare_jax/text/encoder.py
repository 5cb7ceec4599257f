"""What the api needs of a tokenizer. Imports no jax."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Encoder(Protocol):
    """Prompts to token ids and back (pshare_jax.text.tokenizer's); a prompt it cannot encode is a PshareError."""

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The texts of the named control tokens, such as `eos_token`."""
        ...

    @property
    def special_ids(self) -> Collection[int]:
        """The control tokens' ids."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The template's source."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True) -> list[int]:
        """The ids of a text prompt; control tokens written in it are control tokens only if allowed."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token itself writes."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a chat, up to where the answer begins if a generation prompt is added."""
        ...
