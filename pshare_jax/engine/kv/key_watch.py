"""Which waiting sequences depend on a key's presence in a pool: page_manager.py reports keys, waiting.py asks for them."""

from collections.abc import Hashable
from typing import Any

_NOBODY: dict[Hashable, set[Any]] = {}


class KeyWatch:
    """Who is to be noted when a key enters or leaves a pool's tree, and where: by digest, names with the sets that get them."""

    def __init__(self) -> None:
        self._sets: dict[bytes, dict[Hashable, set[Any]]] = {}

    def add(self, digest: bytes, name: Hashable, moved: set[Any]) -> None:
        """From now on `moved` gets the name whenever the key enters or leaves the tree."""
        self._sets.setdefault(digest, {})[name] = moved

    def remove(self, digest: bytes, name: Hashable) -> None:
        """The name no longer depends on the key."""
        del self._sets[digest][name]
        if not self._sets[digest]:
            del self._sets[digest]

    def moved(self, digest: bytes) -> None:
        """The key has entered or left the tree."""
        for name, moved in self._sets.get(digest, _NOBODY).items():
            moved.add(name)

    def all_moved(self) -> None:
        """The tree is another."""
        for digest in self._sets:
            self.moved(digest)
