"""What `benchmarks/agents.py` consists of: a load of agents' sessions, over HTTP, on servers that it may start itself.

config.py (the YAML file) -> workload.py, traces.py (sessions and their prompts) -> client.py, runner.py (one run) ->
statistics.py (its numbers) -> campaign.py (all runs of a config, on targets.py and servers.py) -> report.py, figures.py.
modules.py writes the tasks' random weights, in a process of its own; all other files import no JAX.
"""
