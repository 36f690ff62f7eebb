"""Which page holds which rows: block tables, reference counts, windows, copy-on-write.

One `PageTable` serves all row tensors of one (every, window, sinks). It is host-side bookkeeping
only; the tensors live in the store. Every sequence has a home range of pages (a ring under a
window), and a page is taken from home while it is free there: a plain batch then is the identity
table, which the store reads as one strided view instead of a gather. Positions and lengths are
counted in rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import ceil
from typing import NamedTuple

import numpy as np

from infer.counted import Counted


class StoreFullError(RuntimeError):
    """No free page is left; release a sequence or make the store larger."""


class TableKey(NamedTuple):
    """What row tensors of one block table have in common (`archs.spec.RowSpec`)."""

    every: int
    window: int | None
    sinks: int


#: A page of a sequence and where it lies: sequence, logical page, pool page.
Placed = tuple[int, int, int]


@dataclass(slots=True)
class Change:
    """What a step did to a table, so that it can be undone.

    copies: (source, target) pool pages; the source is shared and is copied before it is written.
    gained: pages taken; left: pages that the window passed; parted: shared pages replaced by
      pages of the sequence's own.
    before: sequence, whether it was at home, its first page past the sinks.
    """

    copies: list[tuple[int, int]] = field(default_factory=list)
    gained: list[Placed] = field(default_factory=list)
    left: list[Placed] = field(default_factory=list)
    parted: list[Placed] = field(default_factory=list)
    before: list[tuple[int, bool, int]] = field(default_factory=list)


class PageTable:
    """Block tables of all sequences over one pool of equal pages.

    max_rows: rows of a sequence at most. lookback: rows that can be taken back.
    pages: of the pool (None: every home range exists).
    """

    def __init__(
        self,
        key: TableKey,
        *,
        sequences: int,
        max_rows: int,
        page_size: int,
        lookback: int = 0,
        pages: int | None = None,
    ) -> None:
        self.key = key
        self.every, self.window, self.sinks = key
        self.page_size = page_size
        self.lookback = lookback
        full = ceil(max_rows / page_size)
        self.sink_pages = ceil(self.sinks / page_size) if self.window is not None else 0
        self.ring = full
        if self.window is not None:
            self.ring = min(full, ceil((self.window - 1 + lookback) / page_size) + 1)
        self.home_pages = min(full, self.sink_pages + self.ring)
        self.wraps = self.home_pages < full
        self.n_pages = sequences * self.home_pages if pages is None else pages
        #: Every home range exists, so a batch at home can be read as one view.
        self.has_homes = self.n_pages == sequences * self.home_pages
        self._pages = Counted(self.n_pages)
        #: Pool page of each logical page that a sequence holds.
        self.tables: list[dict[int, int]] = [{} for _ in range(sequences)]
        #: The same as kernels read it, int32 [sequences + 1, pages]: what a sequence does not hold
        #: is left as it was, and the last row is that of padding, all of it the page past the pool.
        self.blocks = np.zeros((sequences + 1, full), np.int32)
        self.blocks[-1] = self.n_pages
        #: (sequence, logical page) of entries set since somebody last emptied this.
        self.changed: set[tuple[int, int]] = set()
        self.at_home = [True] * sequences
        #: First page past the sinks that each sequence's window has not passed.
        self.first_page = [self.sink_pages] * sequences

    @property
    def refs(self) -> list[int]:
        """How many sequences hold each page."""
        return self._pages.refs

    @property
    def used(self) -> int:
        """Pages that some sequence holds."""
        return self._pages.used

    @property
    def home_rows(self) -> int:
        """Rows in one home range."""
        return self.home_pages * self.page_size

    def rows(self, tokens: int) -> int:
        """Complete rows of `tokens` tokens."""
        return tokens // self.every

    def first_kept(self, length: int) -> int:
        """The oldest position that a sequence of `length` rows keeps, sinks apart."""
        if self.window is None:
            return 0
        return max(0, length - self.window - max(0, self.lookback - 1))

    def fits_ring(self, new: int) -> bool:
        """Whether `new` rows may be written before all the rows they see have been read."""
        return not self.wraps or new <= self.lookback + 1

    def home(self, sequence: int, page: int) -> int:
        """The pool page that a sequence's logical page prefers."""
        base = sequence * self.home_pages
        if page < self.sink_pages or not self.wraps:
            return base + page
        return base + self.sink_pages + (page - self.sink_pages) % self.ring

    def home_row(self, position: int) -> int:
        """The row of an absolute position within a home range."""
        page, offset = divmod(position, self.page_size)
        return self.home(0, page) * self.page_size + offset

    def reserve(self, sequence: int, length: int, new: int, change: Change) -> None:
        """Make the rows of positions length..length+new writable.

        Pages that no new row's token can see are freed first. Everything done is added to
        `change`. Raises StoreFullError; `undo` then takes back what was done by then.
        """
        if new == 0:
            return
        change.before.append((sequence, self.at_home[sequence], self.first_page[sequence]))
        table, refs = self.tables[sequence], self._pages.refs
        end = length + new
        oldest = length
        if self.window is not None:
            visible = length - self.window + 1 - max(0, self.lookback - new)
            if not self.fits_ring(new):
                visible = self.first_kept(end)
                oldest = max(length, visible)
            self._drop_below(sequence, max(0, visible) // self.page_size, change)
        first, last = oldest // self.page_size, (end - 1) // self.page_size
        sunk = range(length // self.page_size, min(self.sink_pages, last + 1, first))
        for page in chain(sunk, range(first, last + 1)):
            held = table.get(page)
            if held is not None and refs[held] == 1:
                continue
            fresh = self._take(sequence, page)
            change.gained.append((sequence, page, fresh))
            self._set(sequence, page, fresh)
            if held is not None:
                change.copies.append((held, fresh))
                change.parted.append((sequence, page, held))
                self._pages.drop(held)

    def undo(self, change: Change, lengths: Mapping[int, int], *, written: bool) -> set[int]:
        """Take back what a step did; returns the sequences whose visible rows it has overwritten.

        lengths: rows of the step's sequences before it. written: whether rows may have been
        written, so that pages that were freed and taken again no longer hold what they held.
        """
        for sequence, page, held in change.gained:
            del self.tables[sequence][page]
            self._pages.drop(held)
        for sequence, at_home, first_page in change.before:
            self.at_home[sequence], self.first_page[sequence] = at_home, first_page
        taken = {held for _, _, held in change.gained} if written else set()
        spoilt = set()
        for sequence, page, held in change.left:
            if held in taken:
                self.first_page[sequence] = max(self.first_page[sequence], page + 1)
                assert self.window is not None
                if (page + 1) * self.page_size > lengths[sequence] - self.window + 1:
                    spoilt.add(sequence)
        spoilt |= {sequence for sequence, _, held in change.parted if held in taken}
        kept = [p for p in change.left if p[1] >= self.first_page[p[0]]]
        for sequence, page, held in (*kept, *change.parted):
            if held not in taken:
                self._set(sequence, page, held)
                self._pages.hold(held)
        return spoilt

    def oldest_row(self, sequence: int) -> int:
        """The position from which on all rows are held; before it only sinks are."""
        first = self.first_page[sequence]
        return 0 if first == self.sink_pages else first * self.page_size

    def reach(self, sequence: int) -> int:
        """The fewest rows that a sequence can be cut to and find all that its tokens see."""
        oldest = self.oldest_row(sequence)
        return 0 if self.window is None or oldest == 0 else oldest + self.window - 1

    def settle(self, sequence: int, length: int) -> None:
        """Free what a sequence of `length` rows no longer keeps."""
        if self.window is not None:
            self._drop_below(sequence, self.first_kept(length) // self.page_size)

    def truncate(self, sequence: int, length: int, end: int) -> None:
        """Forget positions length..end of a sequence of `end` rows."""
        table = self.tables[sequence]
        for page in range(ceil(length / self.page_size), ceil(end / self.page_size)):
            held = table.pop(page, None)
            if held is not None:
                self._pages.drop(held)

    def fork(self, source: int, target: int) -> None:
        """Let `target` share all pages of `source`."""
        table = self.tables[source]
        for page, held in table.items():
            self._pages.hold(held)
            self._set(target, page, held)
        self.at_home[target] = not table
        self.first_page[target] = self.first_page[source]

    def keep(self, sequence: int, pages: Iterable[int]) -> dict[int, int]:
        """Hold logical pages of a sequence once more, for nobody; pool pages by logical page."""
        table = self.tables[sequence]
        kept = {page: table[page] for page in pages}
        for held in kept.values():
            self._pages.hold(held)
        return kept

    def forget(self, kept: Mapping[int, int]) -> None:
        """Let go of pages from `keep`, once."""
        for held in kept.values():
            self._pages.drop(held)

    def adopt(self, sequence: int, kept: Mapping[int, int], first_page: int | None) -> None:
        """Let an empty sequence share pages from `keep`; they stay held there, too."""
        for page, held in kept.items():
            self._pages.hold(held)
            self._set(sequence, page, held)
        self.at_home[sequence] = not kept
        if first_page is not None:
            self.first_page[sequence] = first_page

    def share(self, sequence: int, kept: Mapping[int, int]) -> None:
        """Let a sequence hold pages from `keep` in place of its own, which say the same."""
        for page, held in kept.items():
            own = self.tables[sequence][page]
            if own != held:
                self._pages.hold(held)
                self._set(sequence, page, held)
                self._pages.drop(own)
                self.at_home[sequence] = False

    def release(self, sequence: int) -> None:
        """Give all pages of a sequence back."""
        for held in self.tables[sequence].values():
            self._pages.drop(held)
        self.tables[sequence] = {}
        self.at_home[sequence] = True
        self.first_page[sequence] = self.sink_pages

    def places(self, sequence: int, positions: Iterable[int]) -> list[int]:
        """Pool rows of positions that a sequence holds."""
        table, size = self.tables[sequence], self.page_size
        return [table[p // size] * size + p % size for p in positions]

    def _set(self, sequence: int, page: int, held: int) -> None:
        self.tables[sequence][page] = held
        self.blocks[sequence, page] = held
        self.changed.add((sequence, page))

    def _take(self, sequence: int, page: int) -> int:
        home = self.home(sequence, page)
        taken = self._pages.take(home)
        if taken is None:
            raise StoreFullError(
                f"all {self.n_pages} pages of {self.page_size} rows are in use; "
                "release a sequence, or make the store larger"
            )
        if taken != home:
            self.at_home[sequence] = False
        return taken

    def _drop_below(self, sequence: int, first: int, change: Change | None = None) -> None:
        table = self.tables[sequence]
        for page in range(self.first_page[sequence], first):
            held = table.pop(page, None)
            if held is not None:
                if change is not None:
                    change.left.append((sequence, page, held))
                self._pages.drop(held)
        self.first_page[sequence] = max(self.first_page[sequence], first)
