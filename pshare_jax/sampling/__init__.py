"""How the next token is chosen: sampling parameters, logit adjustments, and the sampler on the device.

`params` and `history` are host code (NumPy alone), `sample` is a pure function over JAX arrays. The engine's sampler,
generation and evaluation call them; the server only fills in `SamplingParams`. Nothing here takes a lock: a `TokenHistory`
belongs to one sequence and is used by the thread of its decode worker.
"""
