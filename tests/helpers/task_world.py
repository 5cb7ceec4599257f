"""Real tiny weights that come, change and go in an engine that the test steps, and what the plain loop says with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.engine.config import BatchConfig, KVConfig, placed
from pshare_jax.engine.request import Request
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.layers import LoraConfig
from pshare_jax.server import startup
from pshare_jax.server.app import AppContext
from pshare_jax.server.config import ServeConfig, ServerConfig, TaskConfig
from pshare_jax.server.openai.schema import ApiError

# Devices that no other test of these shapes uses, so that what is compiled for them was compiled here.
PLACE = placed([[2]], [[3]])
LONG = 24


class World:
    """A base, a folder of modules, and what the plain loop says with each of them."""

    def __init__(self, root: Path):
        self.base = tiny_folder("llama", root / "base", num_hidden_layers=2)
        self.modules = root / "modules"
        make = {"full": ("full", 1), "full2": ("full", 2), "lora": ("lora", 3), "lora2": ("lora", 4)}
        for name, (kind, seed) in make.items():
            tiny_module(self.base, self.modules / name, kind=kind, seed=seed)
        self.model = ps.load(self.base)
        ps.save_module(self.modules / "odd", self._odd(), self.model)
        ps.save_module(
            self.modules / "same",
            ps.DecodeModule(self.model.architecture, self.model.params, self.model.mesh),
            self.model,
        )
        self.shared = ps.factorize(self.model)
        for name in ("base", "full", "full2", "lora", "lora2"):
            self.shared.add_task(name, "base" if name == "base" else self.modules / name)
        self.prompt = self._prompt()

    def _odd(self) -> ps.DecodeModule:
        """A random adapter of another architecture than the others."""
        architecture, draw = (
            self.model.architecture.with_lora(LoraConfig(2, 0.5, ("k", "gate"))),
            np.random.default_rng(5),
        )
        new = {
            path: jnp.asarray(draw.normal(0, 0.4, x.shape), x.dtype)
            for path, x in architecture.shapes.items()
            if is_lora(path)
        }
        return ps.DecodeModule(architecture, {**self.model.params, **new}, self.model.mesh)

    def _prompt(self) -> tuple[int, ...]:
        """One on which all modules differ early, without a near-tie."""
        for seed in range(50):
            prompt = tuple(np.random.default_rng(seed).integers(0, 300, 9).tolist())
            made = [self.rollout(name, prompt) for name in self.shared.tasks]
            if min(one.smallest_gap for one in made) > 1e-4 and len({tuple(one.ids[:4]) for one in made}) == len(made):
                return prompt
        raise AssertionError("no such prompt")

    def rollout(self, module: str, prompt: Any, count: int = LONG) -> Any:
        return ps.rollout(self.shared, module, prompt, max_new_tokens=count, stop_ids=())

    def expected(self, module: str) -> list[int]:
        """The plain loop's answer to the prompt."""
        return self.rollout(module, self.prompt).ids

    def serve(self, tasks: dict[str, str], placement: Any = PLACE, **changes: Any) -> "Stepped":
        sources: dict[str, str | TaskConfig] = {
            name: source if source == "base" else str(self.modules / source) for name, source in tasks.items()
        }
        config = ServeConfig(
            base=str(self.base),
            tasks=sources,
            placement=placement,
            kv=KVConfig(page_size=4, pages=64),
            batch=BatchConfig(prefill_tokens=16, decode_rows=2),
            server=ServerConfig(api_key="key", modules_dir=str(self.modules)),
        )
        return Stepped(self, *startup.build(replace(config, **changes), lambda line: None))


class Stepped:
    """An engine that the test steps, and its task table."""

    def __init__(self, world: World, served: AppContext, programs: list[Any]):
        self.world, self.served, self.programs, self.engine = world, served, programs, served.engine
        assert served.task_table is not None
        self.table = served.task_table
        self._number = 0

    def load(self, name: str, path: Any, in_place: bool = False) -> None:
        self.table.load(name, str(path), in_place).result(60)

    def refusal(self, name: str, path: Any, in_place: bool = False) -> str:
        with pytest.raises(ApiError) as caught:
            self.load(name, path, in_place)
        error = caught.value.error
        assert (caught.value.status, error["param"]) == (400, "lora_path"), error
        assert "\n" not in error["message"]
        assert str(self.world.modules) not in error["message"]
        return error["message"]

    def ask(self, task: str, count: int = LONG, route: Route | None = None) -> Any:
        """The sequence of a request with the world's prompt."""
        self._number += 1
        request = Request(f"r{self._number}", task, self.world.prompt, count)
        self.engine.submit(request, lambda event: None, route)
        return self.engine._live[request.id]

    def step_until(self, reached: Any) -> None:
        for _ in range(2000):
            if reached():
                return
            self.engine.step()
        raise AssertionError("that does not happen")

    def ids(self, *sequences: Any) -> list[list[int]]:
        """What they say in the end."""
        self.step_until(lambda: self.engine.idle)
        self.engine.admission.check()
        assert all(one.state is State.FINISHED for one in sequences)
        return [one.decode.completion_ids for one in sequences]

    def check_everywhere(self, **modules: str) -> None:
        """Tasks answer as these modules on every worker that has them."""
        asked = [(self.ask(task, route=route), task) for route, task in self.engine.router.all_routes()]
        assert {task for _, task in asked} == set(modules)
        expected = [self.world.expected(modules[task]) for _, task in asked]
        assert self.ids(*[sequence for sequence, _ in asked]) == expected

    def check(self, **modules: str) -> None:
        """Tasks answer as these modules."""
        sequences = [self.ask(task) for task in modules]
        assert self.ids(*sequences) == [self.world.expected(module) for module in modules.values()]
