"""KV pages of the engine."""
