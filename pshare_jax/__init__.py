"""pshare_jax: many fine-tuned LLMs over one shared prefill (PrefillShare, arXiv 2602.12029), in JAX.

The public names below are imported on first use (PEP 562), so that `import pshare_jax` is quick and host code can be
imported on a Python without JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pshare_jax.errors import PshareError

if TYPE_CHECKING:
    from pshare_jax.engine.config import EngineConfig
    from pshare_jax.engine.engine import Engine
    from pshare_jax.mesh import make_mesh, virtual_cpu_devices
    from pshare_jax.sampling.params import SamplingParams
    from pshare_jax.share.decode_module import DecodeModule, load_module, save_module
    from pshare_jax.share.factorize import PrefillModule, SharedModel, TaskModules, factorize
    from pshare_jax.share.generate import continue_from, generate, rollout, score
    from pshare_jax.share.model import Model, load
    from pshare_jax.share.nnx_view import TRAINABLE, nnx_view
    from pshare_jax.share.save import save_folder

_HOMES = {
    "engine.config": ("EngineConfig",),
    "engine.engine": ("Engine",),
    "mesh": ("make_mesh", "virtual_cpu_devices"),
    "sampling.params": ("SamplingParams",),
    "share.decode_module": ("DecodeModule", "load_module", "save_module"),
    "share.factorize": ("TaskModules", "PrefillModule", "SharedModel", "factorize"),
    "share.generate": ("continue_from", "generate", "rollout", "score"),
    "share.model": ("Model", "load"),
    "share.nnx_view": ("TRAINABLE", "nnx_view"),
    "share.save": ("save_folder",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DecodeModule",
    "Engine",
    "EngineConfig",
    "TaskModules",
    "Model",
    "PrefillModule",
    "PshareError",
    "SamplingParams",
    "SharedModel",
    "TRAINABLE",
    "continue_from",
    "factorize",
    "generate",
    "load",
    "load_module",
    "make_mesh",
    "nnx_view",
    "rollout",
    "save_folder",
    "save_module",
    "score",
    "virtual_cpu_devices",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
