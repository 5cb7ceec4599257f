"""Attention and the `attend` functions that callers pass to `Decoder`: dense, paged and two-stream (training).

An `attend` combines a KV layout with an attention function; a GPU or TPU kernel is another `PagedAttention`. The jitted
steps and the training objective use them inside traced functions, so nothing here needs a lock.
"""
