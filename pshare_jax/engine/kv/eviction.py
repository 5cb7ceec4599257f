"""The order in which cached pages are evicted: by recency and reuse (GreedyDual with frequency).

PageManager adds a published page when its last reference is released and removes it when it is used again or evicted.
Sessions that have ended put their pages first, and pins put theirs last (sessions.py).
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

    Pages of `add_first` go before all these and pages of `add_last` after them, each in the order in which they were
    added; neither moves the clock.
    """

    def __init__(self) -> None:
        self.clock = 0
        self._queue_of: dict[int, OrderedDict[int, None]] = {}
        self._first: OrderedDict[int, None] = OrderedDict()
        self._last: OrderedDict[int, None] = OrderedDict()
        self._ring: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(NUM_QUEUES)]

    def __len__(self) -> int:
        return len(self._queue_of)

    def __iter__(self) -> Iterator[int]:
        """All pages, the first to be evicted first."""
        turn = self.clock % NUM_QUEUES
        queues = (self._first, *self._ring[turn:], *self._ring[:turn], self._last)
        return (page for queue in queues for page in queue)

    def add(self, page: int, uses: int) -> None:
        """The page has lost its last reference, or counts as used now."""
        self._put(page, self._ring[(self.clock + 1 + (uses if uses < MAX_USES else MAX_USES)) % NUM_QUEUES])

    def add_first(self, page: int) -> None:
        """The page is not expected to be used again."""
        self._put(page, self._first)

    def add_last(self, page: int) -> None:
        """The page has lost its last reference and is pinned, or is pinned again."""
        self._put(page, self._last)

    def _put(self, page: int, queue: OrderedDict[int, None]) -> None:
        """The page's place is at the end of the queue, wherever it was."""
        before = self._queue_of.get(page)
        if before is queue:
            queue.move_to_end(page)
            return
        if before is not None:
            del before[page]
        self._queue_of[page] = queue
        queue[page] = None

    def is_first(self, page: int) -> bool:
        """Whether it was put first."""
        return page in self._first

    def remove(self, page: int) -> None:
        """The page is referenced again, or leaves the cache."""
        del self._queue_of.pop(page)[page]

    def victim(self) -> int:
        """The page to evict; the clock moves to its priority, if it has one."""
        if self._first:
            return next(iter(self._first))
        if len(self._last) == len(self._queue_of):
            return next(iter(self._last))
        while not (queue := self._ring[self.clock % NUM_QUEUES]):
            self.clock += 1
        return next(iter(queue))
