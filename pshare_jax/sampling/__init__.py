"""How the next token is chosen: sampling parameters, logit adjustments, and the sampler on the device.

`params` is host code (NumPy alone), `sample`, `row_state` and `step_rows` are pure functions over JAX arrays. The engine's
sampler, generation and evaluation call them; the server only fills in `SamplingParams`. Nothing here takes a lock.
"""
