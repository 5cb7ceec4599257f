"""The server: HTTP in front, prefill and decode workers behind, KV moved between them once per request.

A request walks api -> engine -> router -> prefill -> transfer -> decode -> engine -> api; only tokens come back up.
"""
