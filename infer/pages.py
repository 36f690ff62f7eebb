"""Which page holds which tokens: block tables, reference counts, windows, copy-on-write.

One `PageTable` serves all layers that share a window. It is host-side bookkeeping only; the
tensors live in the store. Every slot has a home range of pages (a ring under a window), and a
page is taken from home while it is free there: a plain batch then is the identity table, which
the store reads as one strided view instead of a gather.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import ceil

import torch
from torch import Tensor


class StoreFullError(RuntimeError):
    """No free page is left; release a sequence or make the store larger."""


#: A page of a sequence and where it lies: slot, logical page, pool page.
Placed = tuple[int, int, int]


@dataclass(slots=True)
class Change:
    """What a step did to a table, so that it can be undone.

    copies: (source, target) pool pages; the source is shared and is copied before it is written.
    gained: pages taken; left: pages that the window passed; parted: shared pages replaced by
      pages of the sequence's own.
    before: slot, whether it was at home, its first page past the sinks.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    gained: list[Placed] = field(default_factory=list)
    left: list[Placed] = field(default_factory=list)
    parted: list[Placed] = field(default_factory=list)
    before: list[tuple[int, bool, int]] = field(default_factory=list)


class PageTable:
    """Block tables of all sequences over one pool of equal pages."""

    def __init__(
        self,
        *,
        slots: int,
        max_context: int,
        page_size: int,
        window: int | None = None,
        sinks: int = 0,
        lookback: int = 0,
        pages: int | None = None,
    ) -> None:
        self.page_size = page_size
        self.window = window
        self.sinks = sinks
        self.lookback = lookback
        full = ceil(max_context / page_size)
        self.sink_pages = ceil(sinks / page_size) if window is not None else 0
        self.ring = full
        if window is not None:
            self.ring = min(full, ceil((window - 1 + lookback) / page_size) + 1)
        self.pages_per_slot = min(full, self.sink_pages + self.ring)
        self.wraps = self.pages_per_slot < full
        self.n_pages = slots * self.pages_per_slot if pages is None else pages
        #: Every slot's home range exists, so a batch at home can be read as one view.
        self.has_homes = self.n_pages == slots * self.pages_per_slot
        self.refs = [0] * self.n_pages
        #: Free pages, the next to give away first: from the end, then what was freed longest ago,
        #: so that home pages stay free for their slots.
        self._free = OrderedDict.fromkeys(reversed(range(self.n_pages)))
        self.tables: list[dict[int, int]] = [{} for _ in range(slots)]
        self.at_home = [True] * slots
        #: First page past the sinks that each slot's window has not passed.
        self.first_page = [self.sink_pages] * slots
        #: Slots whose table gained or swapped a page since somebody last emptied this set.
        self.changed: set[int] = set()

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return self.n_pages - len(self._free)

    @property
    def rows_per_slot(self) -> int:
        """Rows in one slot's home range."""
        return self.pages_per_slot * self.page_size

    def first_kept(self, length: int) -> int:
        """The oldest position that a sequence of `length` tokens keeps, sinks apart."""
        if self.window is None:
            return 0
        return max(0, length - self.window - max(0, self.lookback - 1))

    def fits_ring(self, new: int) -> bool:
        """Whether `new` tokens may be written before all the rows they see have been read."""
        return not self.wraps or new <= self.lookback + 1

    def home(self, slot: int, page: int) -> int:
        """The pool page that a slot's logical page prefers."""
        base = slot * self.pages_per_slot
        if page < self.sink_pages or not self.wraps:
            return base + page
        return base + self.sink_pages + (page - self.sink_pages) % self.ring

    def home_row(self, position: int) -> int:
        """The row of an absolute position within a slot's home range."""
        page, offset = divmod(position, self.page_size)
        return self.home(0, page) * self.page_size + offset

    def reserve(self, slot: int, length: int, new: int, change: Change) -> None:
        """Make the rows of positions length..length+new writable.

        Pages that no new token can see are freed first. Everything done is added to `change`.
        Raises StoreFullError; `undo` then takes back what was done by then.
        """
        if new == 0:
            return
        change.before.append((slot, self.at_home[slot], self.first_page[slot]))
        table = self.tables[slot]
        end = length + new
        oldest = length
        if self.window is not None:
            visible = length - self.window + 1 - max(0, self.lookback - new)
            if not self.fits_ring(new):
                visible = self.first_kept(end)
                oldest = max(length, visible)
            self._drop_below(slot, max(0, visible) // self.page_size, change)
        first, last = oldest // self.page_size, (end - 1) // self.page_size
        sunk = range(length // self.page_size, min(self.sink_pages, last + 1, first))
        for page in chain(sunk, range(first, last + 1)):
            held = table.get(page)
            if held is not None and self.refs[held] == 1:
                continue
            fresh = self._take(slot, page)
            change.gained.append((slot, page, fresh))
            table[page] = fresh
            self.changed.add(slot)
            if held is not None:
                change.copies.append((held, fresh))
                change.parted.append((slot, page, held))
                self._drop(held)

    def undo(self, change: Change, lengths: Mapping[int, int], *, written: bool) -> set[int]:
        """Take back what a step did; returns the slots whose visible rows it has overwritten.

        lengths: tokens of the step's slots before it. written: whether rows may have been written,
        so that pages that were freed and taken again no longer hold what they held.
        """
        for slot, page, held in change.gained:
            del self.tables[slot][page]
            self._drop(held)
        for slot, at_home, first_page in change.before:
            self.at_home[slot], self.first_page[slot] = at_home, first_page
            self.changed.add(slot)
        taken = {held for _, _, held in change.gained} if written else set()
        spoilt = set()
        for slot, page, held in change.left:
            if held in taken:
                self.first_page[slot] = max(self.first_page[slot], page + 1)
                assert self.window is not None
                if (page + 1) * self.page_size > lengths[slot] - self.window + 1:
                    spoilt.add(slot)
        spoilt |= {slot for slot, _, held in change.parted if held in taken}
        kept = [p for p in change.left if p[1] >= self.first_page[p[0]]]
        for slot, page, held in (*kept, *change.parted):
            if held not in taken:
                self.tables[slot][page] = held
                if self.refs[held]:
                    self.refs[held] += 1
                else:
                    self._claim(held)
        return spoilt

    def oldest_row(self, slot: int) -> int:
        """The position from which on all rows are held; before it only sinks are."""
        first = self.first_page[slot]
        return 0 if first == self.sink_pages else first * self.page_size

    def reach(self, slot: int) -> int:
        """The shortest length that a sequence can be cut to and find all rows that it sees."""
        oldest = self.oldest_row(slot)
        return 0 if self.window is None or oldest == 0 else oldest + self.window - 1

    def settle(self, slot: int, length: int) -> None:
        """Free what a sequence of `length` tokens no longer keeps."""
        if self.window is not None:
            self._drop_below(slot, self.first_kept(length) // self.page_size)

    def truncate(self, slot: int, length: int, end: int) -> None:
        """Forget positions length..end of a sequence of `end` tokens."""
        table = self.tables[slot]
        for page in range(ceil(length / self.page_size), ceil(end / self.page_size)):
            held = table.pop(page, None)
            if held is not None:
                self._drop(held)

    def fork(self, source: int, target: int) -> None:
        """Let `target` share all pages of `source`."""
        table = self.tables[source]
        for held in table.values():
            self.refs[held] += 1
        self.tables[target] = dict(table)
        self.changed.add(target)
        self.at_home[target] = not table
        self.first_page[target] = self.first_page[source]

    def release(self, slot: int) -> None:
        """Give all pages of a slot back."""
        for held in self.tables[slot].values():
            self._drop(held)
        self.tables[slot] = {}
        self.at_home[slot] = True
        self.first_page[slot] = self.sink_pages

    def row_of(self, slot: int, pages: int) -> Tensor:
        """A slot's table as int32 [pages]; pages that are not held map to page 0."""
        row, table = torch.zeros(pages, dtype=torch.int32), self.tables[slot]
        if table:
            row[list(table)] = torch.tensor(list(table.values()), dtype=torch.int32)
        return row

    def rows(self, slot: int, positions: Tensor) -> Tensor:
        """Pool rows of absolute positions (int64, any shape); rows not held map to row 0."""
        table = self.tables[slot]
        if not table:
            return torch.zeros_like(positions)
        lookup = torch.zeros(max(table) + 1, dtype=torch.int64)
        lookup[torch.tensor(list(table))] = torch.tensor(list(table.values()))
        page = (positions // self.page_size).clamp(0, lookup.numel() - 1)
        return lookup[page] * self.page_size + positions % self.page_size

    def _take(self, slot: int, page: int) -> int:
        home = self.home(slot, page)
        if home in self._free:
            return self._claim(home)
        self.at_home[slot] = False
        if not self._free:
            raise StoreFullError(
                f"all {self.n_pages} pages of {self.page_size} tokens are in use; "
                "release a sequence, or make the store larger"
            )
        return self._claim(next(iter(self._free)))

    def _claim(self, page: int) -> int:
        del self._free[page]
        self.refs[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self.refs[page] -= 1
        if self.refs[page] == 0:
            self._free[page] = None

    def _drop_below(self, slot: int, first: int, change: Change | None = None) -> None:
        table = self.tables[slot]
        for page in range(self.first_page[slot], first):
            held = table.pop(page, None)
            if held is not None:
                if change is not None:
                    change.left.append((slot, page, held))
                self._drop(held)
        self.first_page[slot] = max(self.first_page[slot], first)
