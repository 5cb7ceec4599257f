"""The live page: `/` is one static document, `/live` its data.

`page` adds the routes, `stats` collects the data, static/ holds HTML, CSS and JavaScript. app.py is the only caller.
`DashboardStats` is updated by the engine's `on_end` hook and read by /live, both under `engine.lock`; it stores neither
prompts, completions nor session keys.
"""
