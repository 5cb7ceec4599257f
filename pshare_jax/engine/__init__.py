"""The engine: continuous batching of many tasks over one shared prefill, offline or under a server; it knows no HTTP.

A request in eight steps:
1. `Engine.submit` (engine.py) computes its page keys (kv/keys.py); the router (router.py) chooses its two workers.
2. Admission (admission.py) takes the `Sequence` (sequence.py) from its queue when its turn is near, and reserves its pages
   in both pools, all or nothing; kv/ledger.py keeps all lists and tables.
3. The prefill worker (prefill_worker.py) computes the context's KV with the base, chunk by chunk.
4. Full pages are published to the prefix cache (kv/page_manager.py), where other requests find them.
5. A transfer (transfer.py) gathers the pages, puts them on the decode worker's devices and scatters them into its pool.
6. The decode worker (decode_worker.py) starts once all pages are there; scoring steps (scoring.py) precede generation.
7. Each decode step (decode/) consumes a token of every sequence in the batch; the sampler (sampler.py) chooses the next;
   schedule.py says which sequences have the next step or chunk.
8. Each token is an `Event` (request.py) of the request's `Handle` (handle.py) until `Engine.end`; the pages are released.

What a failed step or worker costs is decided in failures.py and recovery.py.

Server, evaluation and benchmarks import this room. `Engine` may be called from any thread; all state is kept under
`engine.lock`, and device work happens outside it, in the thread that owns the pool (worker_thread.py).
"""
