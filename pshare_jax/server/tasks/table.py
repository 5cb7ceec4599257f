"""The tasks of a running server: a folder below `server.modules_dir` becomes a task, replaces one, or a task goes.

task_api.py calls it for clients. Changes are made one at a time, in a thread of their own and in the order of their coming;
weights are loaded and compiled (task_loader.py) before the engine hears of them, so that a change is one moment and a
refusal leaves everything as it was. Host-side, imports no jax.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import Weights
from pshare_jax.errors import PshareError
from pshare_jax.server.openai.schema import ApiError

logger = logging.getLogger(__name__)
Load = Callable[[Path, Sequence[int], Callable[[], None]], Mapping[int, Weights]]
"""(folder, decode workers, called between long pieces of work and may raise) -> weights that are ready to be used."""


class TaskTable:
    """What clients may change about the tasks. `names` is the list that the api serves, in its order."""

    def __init__(
        self,
        engine: Engine,
        names: list[str],
        modules_dir: Path,
        open_workers: Sequence[int],
        load: Load,
        refusal: str | None = None,
    ):
        """New tasks go to `open_workers`; `refusal` says why nothing can change on this server."""
        self._engine, self._names, self._open_workers, self._load = engine, names, open_workers, load
        self._root, self._refusal = modules_dir.resolve(), refusal
        self._thread = ThreadPoolExecutor(1, "pshare-tasks")

    def load(self, name: str, path: str, in_place: bool) -> Future[None]:
        """Serves the module in the folder `path` (below the root, or relative to it) as `name`; done when it is served.

        Fails with ApiError: the name is taken and not `in_place`, the path is not below the root, the module cannot be
        served, or loading failed. Requests for an old task of this name that live end on its weights.
        """
        return self._thread.submit(self._put, name, path, in_place)

    def unload(self, name: str) -> Future[None]:
        """Takes no more requests for a task; done when that is so. Those that live end normally.

        Fails with ApiError: there is no such task.
        """
        return self._thread.submit(self._remove, name)

    def stop(self) -> None:
        """Ends the thread; once the engine takes no requests, what goes on gives up at its next pause."""
        self._thread.shutdown(cancel_futures=True)

    def _put(self, name: str, path: str, in_place: bool) -> None:
        self._check()
        if name in self._names and not in_place:
            message = f"The task {name!r} exists already; set load_inplace to true to replace it."
            raise ApiError(400, message, param="lora_name")
        workers = self._workers(name) if name in self._names else self._open_workers
        weights = self._loaded(name, self._folder(path), workers)
        with self._engine.lock:
            self._engine.put_task(name, weights)
            if name not in self._names:
                self._names.append(name)
        logger.info("the task %r was loaded from %s", name, path)

    def _remove(self, name: str) -> None:
        self._check()
        if name not in self._names:
            message = f"There is no task {name!r} that could be unloaded."
            raise ApiError(404, message, param="lora_name", code="model_not_found")
        with self._engine.lock:
            self._names.remove(name)
            self._engine.put_task(name, {})
        logger.info("the task %r was unloaded", name)

    def _workers(self, name: str) -> list[int]:
        return [worker.index for worker in self._engine.decode_workers if name in worker.tasks]

    def _loaded(self, name: str, folder: Path, workers: Sequence[int]) -> Mapping[int, Weights]:
        try:
            return self._load(folder, workers, self._check)
        except ApiError as error:
            refused = error
        except PshareError as error:
            refused = ApiError(400, self._told(error), param="lora_path")
        except Exception as error:
            logger.exception("the task %r could not be loaded", name)
            why = "there is not enough memory for it" if _is_want_of_memory(error) else "the server's log says why"
            refused = ApiError(500, f"The task {name!r} could not be loaded: {why}.", kind="server_error")
        # Raised out here: the first error keeps what was loaded until then in memory.
        raise refused

    def _folder(self, path: str) -> Path:
        """Where the path leads, all symbolic links followed. What lies elsewhere is refused in the same words, be it or not."""
        try:
            folder = (self._root / path).resolve()
            if folder != self._root and self._is_below(folder) and all(map(self._is_below, _files(folder))):
                return folder
        except (OSError, RuntimeError, ValueError):
            # No path at all, too long, or links in a circle.
            pass
        raise ApiError(400, "lora_path must lead to a folder below the server's modules_dir.", param="lora_path")

    def _is_below(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._root)

    def _told(self, error: PshareError) -> str:
        """The sentence, with paths as clients know them."""
        return str(error).replace(f"{self._root}{os.sep}", "")

    def _check(self) -> None:
        if self._refusal is not None:
            raise ApiError(400, self._refusal)
        if not self._engine.accepting:
            raise ApiError(503, "The server is stopping or a worker has died.", kind="server_error")


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_want_of_memory(error: Exception) -> bool:
    # XLA has one error class for everything; this is the status of a failed allocation.
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
