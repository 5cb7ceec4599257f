"""Plan: memory and time of a run before it starts (`pshare-train --dry-run`).

`memory` computes from shapes and shardings, `short_models` compiles and times models with few layers, `dry_run` prints
both. Only the command line calls it. It reads no weights and writes no run folder.
"""
