"""KV pages: their keys, one manager and one set of device arrays per pool.

Here belongs what knows pages, and nothing of requests or workers. Admission, workers and the API threads call it. Managers
and page tables are used under the engine's lock; a pool's device arrays (`DevicePages`) only by the thread that owns the
pool, without the lock. All but device_pages.py is host code.
"""
