"""The engine: requests of many tasks over one shared prefill, on paged KV with continuous batching. It knows no HTTP.

A request walks engine -> router -> admission -> prefill worker -> transfer -> decode worker, and events come back up
(docs/architecture.md: a request in eight steps). Server, evaluation and benchmarks call `Engine` alone; it stands on
share, model and sampling. All state is guarded by `Engine.lock`; device work happens outside of it, in the one thread that
owns the pool.
"""
