"""A model factorised into a prefill module and decode modules."""
