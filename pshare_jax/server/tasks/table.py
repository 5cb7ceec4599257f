"""Loads, replaces and unloads tasks of a running server from folders below `server.modules_dir`.

tasks/api.py calls it for clients. Changes are made one at a time, in the order of arrival, by a thread of their own; weights
are loaded and compiled (tasks/loader.py) before the engine gets them, so that a change is atomic and a refusal changes nothing.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import Module
from pshare_jax.errors import PshareError
from pshare_jax.server.openai.schema import ApiError, unavailable
from pshare_jax.text.chat_style import ChatStyle

logger = logging.getLogger(__name__)
Load = Callable[[Path, Sequence[int], Callable[[], None]], tuple[Mapping[int, Module], ChatStyle]]
"""(folder, decode workers, check that may raise, called between long steps) -> compiled modules by worker, their chat style."""
PutStyle = Callable[[str, ChatStyle], None]


class TaskTable:
    """Changes the engine's tasks."""

    def __init__(
        self,
        engine: Engine,
        modules_dir: Path,
        open_workers: Sequence[int],
        load: Load,
        refusal: str | None = None,
        put_style: PutStyle | None = None,
    ):
        """New tasks go to `open_workers`; with a `refusal` every change fails with this message. `put_style` is called with
        the chat style of a task before it is served.
        """
        self._put_style = put_style
        self._engine, self._open_workers, self._load = engine, open_workers, load
        self._root, self._refusal = modules_dir.resolve(), refusal
        self._thread = ThreadPoolExecutor(1, "pshare-tasks")

    def load(self, name: str, path: str, in_place: bool) -> Future[None]:
        """Serves the module in the folder `path` (below the root, or relative to it) as `name`; done once it is served.

        Fails with ApiError: the name exists and not `in_place`, the path is not below the root, the module cannot be
        served, or loading failed. Live requests for a replaced task finish on its old weights.
        """
        return self._thread.submit(self._put, name, path, in_place)

    def unload(self, name: str) -> Future[None]:
        """Stops serving a task; done once new requests are refused. Live requests finish normally.

        Fails with ApiError: the task does not exist.
        """
        return self._thread.submit(self._remove, name)

    def stop(self) -> None:
        """Ends the thread; a running load stops at its next check once the engine accepts no requests."""
        self._thread.shutdown(cancel_futures=True)

    def _put(self, name: str, path: str, in_place: bool) -> None:
        self._check()
        if name in self._engine.tasks and not in_place:
            message = f"The task {name!r} already exists; set load_inplace to true to replace it."
            raise ApiError(400, message, param="lora_name")
        workers = self._workers(name) if name in self._engine.tasks else self._open_workers
        modules, style = self._load_modules(name, self._folder(path), workers)
        if self._put_style is not None:
            self._put_style(name, style)
        self._engine.put_task(name, modules)
        logger.info("loaded task %r from %s", name, path)

    def _remove(self, name: str) -> None:
        self._check()
        if name not in self._engine.tasks:
            message = f"The task {name!r} does not exist; /v1/models lists the tasks that can be unloaded."
            raise ApiError(404, message, param="lora_name", code="model_not_found")
        self._engine.put_task(name, {})
        logger.info("unloaded task %r", name)

    def _workers(self, name: str) -> list[int]:
        return [worker.index for worker in self._engine.decode_workers if name in worker.tasks]

    def _load_modules(self, name: str, folder: Path, workers: Sequence[int]) -> tuple[Mapping[int, Module], ChatStyle]:
        try:
            return self._load(folder, workers, self._check)
        except ApiError as error:
            failure = error
        except PshareError as error:
            failure = ApiError(400, self._relative_message(error), param="lora_path")
        except Exception as error:
            logger.exception("loading task %r failed", name)
            reason = "not enough memory" if _is_out_of_memory(error) else "internal error, see the server's log"
            failure = ApiError(500, f"The task {name!r} could not be loaded: {reason}.", kind="server_error")
        # Raised outside the handlers: the first error's traceback keeps the loaded arrays in memory.
        raise failure

    def _folder(self, path: str) -> Path:
        """The resolved path. Every path outside the root gets the same error, so that its existence is not revealed."""
        try:
            folder = (self._root / path).resolve()
            if folder != self._root and self._is_below(folder) and all(map(self._is_below, _files(folder))):
                return folder
        except (OSError, RuntimeError, ValueError):
            # An invalid or too long path, or a loop of symbolic links.
            pass
        raise ApiError(400, "lora_path must be a folder below the server's modules_dir.", param="lora_path")

    def _is_below(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._root)

    def _relative_message(self, error: PshareError) -> str:
        """The error's message, with paths relative to the root."""
        return str(error).replace(f"{self._root}{os.sep}", "")

    def _check(self) -> None:
        if self._refusal is not None:
            raise ApiError(400, self._refusal)
        if not self._engine.accepting:
            raise unavailable()


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_out_of_memory(error: Exception) -> bool:
    # XLA has a single error class; this is its status for a failed allocation.
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
