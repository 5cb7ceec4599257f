"""Parts of benchmarks/device_check.py: one module for each measurement, and what they have in common.

`check.py` runs the parts and keeps their numbers; `counts.py`, `cards.py` and `sizes.py` are arithmetic without JAX.
"""
