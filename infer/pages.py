"""Which page holds which tokens: block tables, reference counts, windows, copy-on-write.

One `PageTable` serves all layers that share a window. It is host-side bookkeeping only; the
tensors live in the store. Every slot has a home range of pages (a ring under a window), and a
page is taken from home while it is free there: a plain batch then is the identity table, which
the store reads as one strided view instead of a gather.
"""

from math import ceil

import torch
from torch import Tensor


class StoreFullError(RuntimeError):
    """No free page is left; release a sequence or make the store larger."""


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
        self.used = 0
        self.tables: list[dict[int, int]] = [{} for _ in range(slots)]
        self.at_home = [True] * slots
        #: Slots whose table gained or swapped a page since somebody last emptied this set.
        self.changed: set[int] = set()
        self._spare = 0

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

    def reserve(self, slot: int, length: int, new: int, copies: list[tuple[int, int]]) -> None:
        """Make the rows of positions length..length+new writable.

        Pages that no new token can see are freed first. Appends the (source, destination) pool
        pages to copy because the source is shared. Raises StoreFullError; what was appended by
        then must still be copied.
        """
        if new == 0:
            return
        table = self.tables[slot]
        end = length + new
        oldest = length
        if self.window is not None:
            visible = length - self.window + 1 - max(0, self.lookback - new)
            if not self.fits_ring(new):
                visible = self.first_kept(end)
                oldest = max(length, visible)
            self._drop_below(slot, max(0, visible) // self.page_size)
        wanted = set(range(oldest // self.page_size, (end - 1) // self.page_size + 1))
        wanted |= set(
            range(length // self.page_size, min(self.sink_pages, ceil(end / self.page_size)))
        )
        for page in sorted(wanted):
            held = table.get(page)
            if held is None:
                table[page] = self._take(slot, page)
                self.changed.add(slot)
            elif self.refs[held] > 1:
                self.changed.add(slot)
                fresh = self._take(slot, page)
                copies.append((held, fresh))
                self._drop(held)
                table[page] = fresh

    def settle(self, slot: int, length: int) -> None:
        """Free what a sequence of `length` tokens no longer keeps."""
        if self.window is not None:
            self._drop_below(slot, self.first_kept(length) // self.page_size)

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything from position `length` on."""
        table = self.tables[slot]
        for page in [p for p in table if p * self.page_size >= length]:
            self._drop(table.pop(page))

    def fork(self, source: int, target: int) -> None:
        """Let `target` share all pages of `source`."""
        table = self.tables[source]
        for held in table.values():
            self.refs[held] += 1
        self.tables[target] = dict(table)
        self.changed.add(target)
        self.at_home[target] = not table

    def release(self, slot: int) -> None:
        """Give all pages of a slot back."""
        for held in self.tables[slot].values():
            self._drop(held)
        self.tables[slot] = {}
        self.at_home[slot] = True

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
        if home < self.n_pages and self.refs[home] == 0:
            return self._claim(home)
        self.at_home[slot] = False
        for offset in range(self.n_pages):
            candidate = (self._spare - offset) % self.n_pages
            if self.refs[candidate] == 0:
                self._spare = candidate
                return self._claim(candidate)
        raise StoreFullError(
            f"all {self.n_pages} pages of {self.page_size} tokens are in use; "
            "release a sequence, or make the store larger"
        )

    def _claim(self, page: int) -> int:
        self.refs[page] = 1
        self.used += 1
        return page

    def _drop(self, page: int) -> None:
        self.refs[page] -= 1
        if self.refs[page] == 0:
            self.used -= 1

    def _drop_below(self, slot: int, first: int) -> None:
        table = self.tables[slot]
        for page in [p for p in table if self.sink_pages <= p < first]:
            self._drop(table.pop(page))
