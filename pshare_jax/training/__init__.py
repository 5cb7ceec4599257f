"""Training: from a train config to a decode module on a frozen base.

`cli.py` starts a run, `run.py` carries it out in its run folder, `trainer.py` is the loop. `data/` makes batches of
files, `step/` holds the device programs, `plan/` estimates memory and time. Host code calls from one thread, which owns
the devices; batches may be built in worker processes. It imports model, share and text, never engine or server;
evaluation, benchmarks and experiments may call it.
"""
