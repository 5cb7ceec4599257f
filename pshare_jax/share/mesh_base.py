"""The base on one mesh: its weights are there only while something uses them.

A decode mesh whose tasks are all full modules has no base. The first LoRA or base task brings it, and the last to go takes
it along. The engine's builder makes one for each mesh, loaders ask it; they take turns, so nothing is locked.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
from jax.sharding import Mesh

from pshare_jax.errors import PshareError
from pshare_jax.mesh import same_devices
from pshare_jax.share.model import Model, Weights
from pshare_jax.weights.load import Tensors

Bring = Callable[[Mesh, Tensors], Model]
"""(mesh, tensors that it has) -> the base on that mesh, with those of the tensors that are its own."""


class MeshBase:
    """The base of a mesh. `outline` is the base without weights, `tensors` what of models is on the mesh, by content.

    `bring` makes the base: a copy from another mesh, or read from its source again.
    """

    def __init__(self, base: Model, mesh: Mesh, bring: Bring):
        self.outline, self.bring = replace(base, params={}, mesh=mesh, tensors=Tensors()), bring
        self.tensors, self._hashes = Tensors(), base.hashes
        self._kept: Model | None = None
        if same_devices(base.mesh, mesh):
            self.tensors.update({(path, digest): base.params[path] for path, digest in self._hashes.items()})

    @classmethod
    def of(cls, base: Model) -> "MeshBase":
        """A base that is on the mesh and stays there."""
        made = cls(base, base.mesh, lambda mesh, tensors: base)
        made._kept = base
        return made

    @property
    def arrays(self) -> list[jax.Array]:
        """The base's tensors that are on the mesh, in use by the base or by modules that have the same."""
        return [array for key in self._hashes.items() if (array := self.tensors.get(key)) is not None]

    def is_base(self, weights: Weights) -> bool:
        """Whether these are the base's own parameters."""
        same = weights.architecture == self.outline.architecture and len(weights.params) == len(self._hashes)
        return same and all(self.tensors.get(key) is weights.params.get(key[0]) for key in self._hashes.items())

    def model(self) -> Model:
        """The base with its weights, for as long as the caller or a module made from it keeps them: no tensor is there twice, and
        nothing is brought while all of them are there.

        Raises:
            PshareError: the base's source has other weights than at the start.
        """
        if self._kept is not None:
            return self._kept
        held = {path: self.tensors.get((path, digest)) for path, digest in self._hashes.items()}
        params = {path: array for path, array in held.items() if array is not None}
        if held and len(params) == len(held):
            return replace(self.outline, params=params, tensors=self.tensors)
        base = self.bring(self.outline.mesh, self.tensors)
        if base.fingerprint != self.outline.fingerprint:
            raise PshareError(
                "the base's files have changed since the server started, and this task needs them; start the server again."
            )
        # The engine may have chosen another form of attention than its source has.
        return replace(base, architecture=self.outline.architecture)
