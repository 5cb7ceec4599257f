"""Model weights on disk: where they come from, and how each file format becomes Hugging Face tensors.

Readers hand over host arrays under Hugging Face names (`checkpoint.Checkpoint`); `names` maps those names to
parameters, `load` puts them on devices. The readers and `sources` import no jax.
"""
