"""The HTTP server over the engine."""
