"""The one decoder for all families: its config, layers, attention and dense KV. No file here knows about serving or training."""
