"""What is free of a server's memory: pages of every table, and slots of fixed tensors."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from infer.capacity import Capacity
from infer.sequence import Answer

#: Pages of each table, and slots last.
Counts = tuple[int, ...]


class Memory(NamedTuple):
    """used: what those that run hold, each page once. idle: what is kept for nobody. copies: what
    those that run would hold if they shared nothing.
    """

    used: Counts
    idle: Counts
    copies: Counts


class Ledger:
    """free: what nobody holds. idle: what is kept of prefixes that nobody uses: free on demand.
    copies: as in `Memory`.
    """

    def __init__(self, capacity: Capacity) -> None:
        self.total: Counts = (*capacity.pages.values(), capacity.slots)
        self.free = list(self.total)
        self.idle = [0] * len(self.total)
        self.copies = [0] * len(self.total)
        self._capacity = capacity
        self._slot = int(capacity.slots > 0)

    @property
    def used(self) -> Counts:
        """What is held by those that run, shared or not; each counted once."""
        return tuple([t - f - i for t, f, i in zip(self.total, self.free, self.idle, strict=True)])

    @property
    def memory(self) -> Memory:
        """Who holds how much."""
        return Memory(self.used, tuple(self.idle), tuple(self.copies))

    def runs(self, counts: Counts) -> None:
        """Somebody who runs holds so much, shared or not; less where it is negative."""
        self.copies = [n + c for n, c in zip(self.copies, counts, strict=True)]

    def with_slot(self, pages: Sequence[int]) -> Counts:
        """Pages, and the slot of one sequence where there are any."""
        return (*pages, self._slot)

    def more(self, answers: Iterable[Answer], tokens: int) -> Counts:
        """Pages that answers need before they can be extended by so many tokens."""
        more = [0] * (len(self.total) - 1)
        for answer in answers:
            if answer.held + tokens > answer.room:
                wanted = self._capacity.pages_of(answer.held + tokens)
                counts = zip(more, wanted, answer.pages, answer.shared, strict=True)
                more = [m + w - h - s for m, w, h, s in counts]
        return (*more, 0)

    def has(self, wanted: Counts) -> bool:
        """Whether so much is free."""
        return all(w <= f for w, f in zip(wanted, self.free, strict=True))

    def could_have(self, wanted: Iterable[int]) -> bool:
        """Whether so much is free or idle."""
        return all(w <= f + i for w, f, i in zip(wanted, self.free, self.idle, strict=True))

    def take(self, counts: Counts) -> None:
        """Hold what is free."""
        self.free = [f - c for f, c in zip(self.free, counts, strict=True)]

    def give(self, counts: Counts) -> None:
        """Let go of it."""
        self.free = [f + c for f, c in zip(self.free, counts, strict=True)]

    def lay_by(self, counts: Counts) -> None:
        """What is held is held for nobody any more."""
        self.idle = [i + c for i, c in zip(self.idle, counts, strict=True)]

    def take_up(self, counts: Counts) -> None:
        """What was held for nobody is held for somebody."""
        self.idle = [i - c for i, c in zip(self.idle, counts, strict=True)]
