"""KV pages: their keys, one page manager and one set of device arrays per pool.

Here belongs what knows pages, and nothing of requests or workers. Admission, workers and API threads call managers, under
the engine's lock (only the counts `num_...` may be read without it); page tables are changed under it too, and read by the
worker that has the sequence. Only the thread that owns a pool touches its device arrays, without the lock.
"""
