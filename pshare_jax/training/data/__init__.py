"""Data: from files and generated tasks to packed batches of NumPy arrays.

`sources` -> `rendering` (`records`, `samples`) -> `store` is the preparation (`prepare.py`, with `report.py`, `cache.py` and
`workers.py`); `packing` ->
`epochs` -> `batches` -> `loader` is the iteration. Nothing here starts JAX. The trainer, the dry run and evaluation
call `prepare` and the loader; the loader's worker processes read the same store and share no state with the training
process.
"""
