"""The order in which cached pages are evicted: by recency and reuse (GreedyDual with frequency).

PageManager adds a published page when its last reference is released and removes it when it is used again or evicted.
"""

from collections import OrderedDict
from collections.abc import Iterator

MAX_USES = 4  # more uses weigh no more
NUM_QUEUES = MAX_USES + 2  # a ring: every priority lies between the clock and the clock + 1 + MAX_USES


class EvictionOrder:
    """The page with the least priority is evicted first; of equal priorities, the page that was added first.

    The priority is clock + 1 + uses at the time of `add`, and the clock is the priority of the last victim. So one-off
    prompts turn over among themselves, and each turnover advances the clock by one: a page that was reused n times
    outlasts n turnovers, then it is evicted too.

    All pages cost the same, although a page deep in a prompt takes more attention to compute again: a weight for it would
    put ends of prompts behind their beginnings, and without its beginning an end is lost.
    """

    def __init__(self) -> None:
        self.clock = 0
        self._priority: dict[int, int] = {}
        self._queues: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(NUM_QUEUES)]

    def __len__(self) -> int:
        return len(self._priority)

    def __iter__(self) -> Iterator[int]:
        """All pages, the first to be evicted first."""
        turn = self.clock % NUM_QUEUES
        return (page for queue in self._queues[turn:] + self._queues[:turn] for page in queue)

    def add(self, page: int, uses: int) -> None:
        """The page has lost its last reference."""
        priority = self._priority[page] = self.clock + 1 + (uses if uses < MAX_USES else MAX_USES)
        self._queues[priority % NUM_QUEUES][page] = None

    def remove(self, page: int) -> None:
        """The page is referenced again or leaves the cache."""
        del self._queues[self._priority.pop(page) % NUM_QUEUES][page]

    def victim(self) -> int:
        """The page to evict; the clock moves to its priority."""
        while not (queue := self._queues[self.clock % NUM_QUEUES]):
            self.clock += 1
        return next(iter(queue))
