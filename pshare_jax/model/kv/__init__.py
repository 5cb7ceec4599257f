"""KV layouts as plain arrays: `dense` for one batch of sequences, `pages` for the pools of serving workers.

Only these files know the order of axes. Share and the dense steps use `dense`; the paged steps and engine/kv use
`pages`. Arrays have no lock: the worker thread of a pool is the only one that donates its pages.
"""
