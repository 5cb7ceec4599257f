"""The body field `agent_hint`: what an agent says of its session, for the cache and the router."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pshare_jax.engine.request import MAX_PIN_SECONDS, Hint

SessionName = Annotated[str, Field(max_length=256)]


class AgentHint(BaseModel):
    """Unknown keys are ignored, and counted; null means absent."""

    model_config = ConfigDict(strict=True, extra="allow")

    session: SessionName | None = None
    parent: SessionName | None = None
    pin_seconds: Annotated[float, Field(ge=0, le=MAX_PIN_SECONDS)] | None = None
    evict: bool = False
    prefetch: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError("agent_hint must be an object.")
        return {name: value for name, value in data.items() if value is not None}

    @property
    def num_unknown(self) -> int:
        """Keys that this server does not know."""
        return len(self.model_extra or {})

    @property
    def hint(self) -> Hint:
        """The engine's hint; the session's name is a field of the request."""
        return Hint(self.parent or None, self.pin_seconds, self.evict, self.prefetch)
