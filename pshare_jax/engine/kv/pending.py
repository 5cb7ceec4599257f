"""Who computes or copies which page just now, and who waits for it (fan-out: four equal prompts cost one prefill).

The prefix cache owns one of these and alone calls it. It knows page ids, owners and waiters (any hashable: sequences,
or a transfer that inherited from one), nothing of keys. Waits have no cycles: a sequence waits only for pages that were
pending before its own.
"""

from collections.abc import Collection, Hashable, Sequence


class PendingPages:
    """WorkerThread -> pages under way and waiter -> pages it needs; both empty when nothing is under way."""

    def __init__(self) -> None:
        self._owner: dict[int, Hashable] = {}
        self._owned: dict[Hashable, set[int]] = {}
        self._waiters: dict[int, dict[Hashable, None]] = {}  # in the order of their coming
        self._awaited: dict[Hashable, set[int]] = {}

    def __contains__(self, page: int) -> bool:
        return page in self._owner

    def pages(self) -> Collection[int]:
        """All pages under way."""
        return self._owner.keys()

    def owner(self, page: int) -> Hashable | None:
        """Who computes or copies the page, or None if it is not under way."""
        return self._owner.get(page)

    def waits(self, waiter: Hashable) -> bool:
        """Whether the waiter needs a page that is not there yet."""
        return waiter in self._awaited

    def awaited(self, page: int) -> bool:
        """Whether anybody waits for the page."""
        return page in self._waiters

    def add(self, owner: Hashable, page: int) -> None:
        """The owner is about to compute or copy the page."""
        if page in self._owner:
            raise AssertionError(f"page {page} is already pending")
        self._owner[page] = owner
        self._owned.setdefault(owner, set()).add(page)

    def wait(self, waiter: Hashable, page: int) -> None:
        """The waiter needs a page that somebody else has under way."""
        if self._owner[page] == waiter:
            raise AssertionError(f"the owner of page {page} would wait for itself")
        self._waiters.setdefault(page, {})[waiter] = None
        self._awaited.setdefault(waiter, set()).add(page)

    def done(self, owner: Hashable, page: int) -> None:
        """The page is there: nobody waits for it any more. A page that is not under way is no matter."""
        if page not in self._owner:
            return
        if self._owner[page] != owner:
            raise AssertionError(f"page {page} was finished by another than its owner")
        for waiter in self._remove(page):
            self._stop_waiting(waiter, page)

    def drop(self, gone: Hashable) -> tuple[list[int], list[Hashable]]:
        """`gone` neither computes nor waits any more. Returns the pages no longer under way, and who must start anew.

        Whoever waited for one of those pages must, and is gone from here too, with the pages it had under way itself.
        """
        pages: list[int] = []
        told: dict[Hashable, None] = {gone: None}
        todo = [gone]
        while todo:
            leaver = todo.pop(0)
            for page in self._awaited.pop(leaver, ()):
                self._remove_waiter(page, leaver)
            for page in sorted(self._owned.get(leaver, ())):
                pages.append(page)
                new = [waiter for waiter in self._remove(page) if waiter not in told]
                told.update(dict.fromkeys(new))
                todo.extend(new)
        return pages, [waiter for waiter in told if waiter != gone]

    def hand_over(self, owner: Hashable, heir: Hashable, pages: Sequence[int]) -> None:
        """Those of the pages that the owner has under way are the heir's from now on; their waiters stay."""
        for page in pages:
            if self._owner.get(page) != owner:
                continue
            waiters = self._remove(page)
            if heir in waiters:
                raise AssertionError(f"the heir of page {page} would wait for itself")
            self.add(heir, page)
            if waiters:
                self._waiters[page] = waiters

    def check(self, live: Collection[Hashable] | None = None) -> None:
        """Raises AssertionError if the two directions disagree, or an owner or waiter is not among the live."""
        owned = {(owner, page) for owner, pages in self._owned.items() for page in pages}
        if owned != {(owner, page) for page, owner in self._owner.items()} or not all(self._owned.values()):
            raise AssertionError("pending pages and their owners disagree")
        awaited = {(waiter, page) for waiter, pages in self._awaited.items() for page in pages}
        if awaited != {(waiter, page) for page, waiters in self._waiters.items() for waiter in waiters}:
            raise AssertionError("awaited pages and their waiters disagree")
        if not self._waiters.keys() <= self._owner.keys() or not all(self._awaited.values()):
            raise AssertionError("a page is awaited that nobody has under way")
        for name in (*self._owned, *self._awaited):
            if live is not None and name not in live:
                raise AssertionError(f"{name!r} has gone, but pages are pending for it")

    def _remove(self, page: int) -> dict[Hashable, None]:
        owner = self._owner.pop(page)
        self._owned[owner].discard(page)
        if not self._owned[owner]:
            del self._owned[owner]
        return self._waiters.pop(page, {})

    def _remove_waiter(self, page: int, waiter: Hashable) -> None:
        # The page may have gone before: its owner left in the same `drop`.
        waiters = self._waiters.get(page, {})
        waiters.pop(waiter, None)
        if page in self._waiters and not waiters:
            del self._waiters[page]

    def _stop_waiting(self, waiter: Hashable, page: int) -> None:
        self._awaited[waiter].discard(page)
        if not self._awaited[waiter]:
            del self._awaited[waiter]
