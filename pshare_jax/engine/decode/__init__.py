"""Decode steps that do not wait for the host: rows with a slot on the device, and steps in flight; no jax.

Here belongs what the decode worker's thread (decode_worker.py) keeps between two steps. It is touched by that thread alone,
but for sequences' fields, which are read and written under the engine's lock.
"""
