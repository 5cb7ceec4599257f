"""Attention functions that callers hand to the decoder."""
