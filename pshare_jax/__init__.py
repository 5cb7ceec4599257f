"""pshare_jax: many fine-tuned LLMs over one shared prefill (PrefillShare, arXiv 2602.12029), in JAX."""

from pshare_jax.errors import PshareError
from pshare_jax.mesh import make_mesh, virtual_cpu_devices
from pshare_jax.sampling.sample import SamplingParams
from pshare_jax.share.decode_module import DecodeModule, load_module, save_module
from pshare_jax.share.factorize import DecodeModules, PrefillModule, SharedModel, factorize
from pshare_jax.share.generate import continue_from, generate, rollout, score
from pshare_jax.share.model import Model, load
from pshare_jax.share.save import save_folder

__all__ = [
    "DecodeModule",
    "DecodeModules",
    "Model",
    "PrefillModule",
    "PshareError",
    "SamplingParams",
    "SharedModel",
    "continue_from",
    "factorize",
    "generate",
    "load",
    "load_module",
    "make_mesh",
    "rollout",
    "save_folder",
    "save_module",
    "score",
    "virtual_cpu_devices",
]
