"""The record of one page, as page_manager.py and sessions.py share it."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Optional

from pshare_jax.engine.kv.keys import PageKey

if TYPE_CHECKING:
    from pshare_jax.engine.kv.sessions import Session, Tip


@dataclass(eq=False, slots=True)
class Page:
    """A page is in the tree of prefixes, below its parent, while it has a key.

    It is pending while it has a producer, else published while it has a key, else free while it has no reference; private
    pages are held, but no prefix leads to them.
    """

    id: int
    refs: int = 0
    uses: int = 0  # reservations that shared it since it was published
    key: PageKey | None = None
    parent: Optional["Page"] = None
    depth: int = 0  # pages of the prompt up to this one, while it has a key
    children: dict["Page", None] = field(default_factory=dict)
    producer: Hashable | None = None
    waiters: dict[Hashable, None] = field(default_factory=dict)  # in the order of their arrival
    owner: Optional["Session"] = None  # the only session that has used it; None: there are others, or none is known
    tips: dict["Tip", None] = field(default_factory=dict)  # of the prompts that end here
    pins: int = 0  # tips of pins here and behind
    prefetched: bool = False  # and not used since

    def matches(self, key: PageKey, parent: Optional["Page"]) -> bool:
        """Whether it is this prompt's page: digests may collide."""
        return self.parent is parent and self.key is not None and self.key.content == key.content

    def check(self) -> None:
        """Raises AssertionError unless the record agrees with those around it."""
        parent, pending = self.parent, self.producer is not None
        faults = {
            "is for padding, but in use": self.id == 0 and bool(self.refs or self.key or pending),
            "has a negative reference count": self.refs < 0,
            "is pending without a reference": pending and self.refs < 1,
            "is awaited without a producer": bool(self.waiters) and not pending,
            "has relatives without a key": self.key is None and bool(parent or self.children),
            "has a child with another parent": any(child.parent is not self for child in self.children),
            "is no child of its parent": parent is not None and self not in parent.children,
            "is published before its parent": not pending and parent is not None and parent.producer is not None,
            "has another depth than its place": self.key is not None
            and self.depth != (parent.depth if parent else 0) + 1,
            "has more uses than its parent": parent is not None and self.uses > parent.uses,
        }
        if any(faults.values()):
            raise AssertionError(f"page {self.id} " + " and ".join(fault for fault in faults if faults[fault]))
