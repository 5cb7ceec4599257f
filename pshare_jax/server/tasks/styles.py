"""The chat styles of the served tasks: what the config says about a task, else its module's manifest, else the config's default.

startup.py makes it and adds the first modules, table.py changes it; completions.py and the tokenizer endpoints look tasks up.
"""

from collections.abc import Mapping
from dataclasses import replace

from pshare_jax.server.config import ServeConfig, TaskConfig
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tool_format import parse_format


class TaskStyles:
    """The style of each task. A lookup never waits: changes replace single entries."""

    def __init__(self, config: ServeConfig) -> None:
        self._default = None if config.tool_format is None else parse_format(config.tool_format, "tool_format")
        self._tasks: Mapping[str, str | TaskConfig] = config.tasks
        self._styles: dict[str, ChatStyle] = {}

    def put(self, task: str, module: ChatStyle) -> None:
        """Serves a module of this style as `task`."""
        own = self._tasks.get(task)
        form, system = module.tool_format or self._default, module.system
        if isinstance(own, TaskConfig):
            form = form if own.tool_format is None else parse_format(own.tool_format, f"tasks.{task}.tool_format")
            system = system if own.layout is None else own.layout.system
        self._styles[task] = replace(module, tool_format=form, system=system)

    def of(self, task: str) -> ChatStyle:
        """The task's style."""
        return self._styles.get(task, ChatStyle(self._default))
