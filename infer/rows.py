"""The rows of one block table in one step: how new ones are stored, and which are seen.

A batch whose sequences are adjacent and whose pages are at home reads the pool as one strided
view; any other batch gathers, or leaves the pages to kernels. New rows are written before they are
read, except when more come than a window's ring can hold: then the past is gathered first and
joined with them.
"""

from functools import cached_property
from operator import itemgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from archs.state import NEVER, PagedSeen, Pages, Rows, Seen, visible
from infer.books import Books, RowBooks, pool_rows, staged
from infer.pages import Change, PageTable


class StepBooks(Protocol):
    """What a step's plan tells of it; `infer.plan.StepPlan` says what each is."""

    sequences: list[int]
    lengths: list[int]
    counts: list[int]
    new_tokens: int
    start: int
    uniform: bool
    full: bool
    adjacent: bool
    kernels: bool
    device: torch.device

    @property
    def bound(self) -> int:
        """Most tokens of a sequence after the step."""
        ...

    @property
    def positions(self) -> Tensor:
        """Of the new tokens, int64 [1 or B, K]."""
        ...

    @property
    def books(self) -> Books:
        """The step as tensors on the device."""
        ...


#: Page of rows that are joined for one step only, for kernels.
JOINED_PAGE = 64


class Held(NamedTuple):
    """A row tensor in the store.

    pool: [*planes, rows, row]; home: the batch's own rows of it, [B, *planes, home_rows, row],
    where its sequences are adjacent and at home. scales: [*planes, rows, 1], of a pool that holds
    8-bit codes alone.
    """

    pool: Tensor
    home: Tensor | None
    scales: Tensor | None = None


class RowForm(Protocol):
    """One way to store and see the rows of a table in one step."""

    def append(self, held: Held, rows: Tensor) -> Rows:
        """Store new rows [B, R, *planes, row]; all rows that the new tokens may see."""
        ...


class Plain(NamedTuple):
    """All sequences at one length and at home: the new rows are `row` to `row + new` of each.

    visible: home rows, from the first, that hold what is seen; mask: over them.
    """

    row: int
    new: int
    visible: int
    mask: Tensor | None

    def append(self, held: Held, rows: Tensor) -> Seen:
        """As `RowForm.append`."""
        assert held.home is not None
        if self.new:
            held.home.narrow(-2, self.row, self.new).copy_(first_rows(rows, self.new))
        return Seen(held.home.narrow(-2, 0, self.visible), self.mask, False)


class AtHome(NamedTuple):
    """Sequences of any lengths at home: written by index, read as one view.

    who, at: int64 [N], the sequence of the batch and the home row of each new row that is valid;
    chosen: which of the flattened [B * R] new rows those are (None: all of them).
    visible, mask: as `Plain`'s.
    """

    who: Tensor
    at: Tensor
    chosen: Tensor | None
    visible: int
    mask: Tensor | None

    def append(self, held: Held, rows: Tensor) -> Seen:
        """As `RowForm.append`."""
        assert held.home is not None
        new = rows.flatten(0, 1)
        new = new if self.chosen is None else new[self.chosen]
        held.home.movedim(-2, 1).index_put_((self.who, self.at), new)
        return Seen(held.home.narrow(-2, 0, self.visible), self.mask, False)


class InPages(NamedTuple):
    """Rows in pages anywhere; they are gathered where no kernel reads them.

    bound: most rows that a sequence has after the step.
    """

    books: RowBooks
    bound: int
    kernels: bool

    def append(self, held: Held, rows: Tensor) -> PagedSeen:
        """As `RowForm.append`."""
        self.books.write(held.pool, rows, newest=False, kernels=self.kernels)
        return self.see(held)

    def see(self, held: Held) -> PagedSeen:
        """What is seen once new rows have been written."""
        return PagedSeen(self.books.pages(held.pool), self.books.books.new_tokens, self.bound)


class RowStep:
    """One block table in one step: its part of the host's books, and the form that they allow.

    lengths, counts, ends: rows of each sequence before the step, new in it, and after it.
    new: rows of the padded batch.
    """

    def __init__(self, plan: StepBooks, table: PageTable) -> None:
        self.plan = plan
        self.table = table
        self.new = -(-plan.new_tokens // table.every)
        self.lengths, self.counts = plan.lengths, plan.counts
        if table.every > 1:
            pairs = list(zip(plan.lengths, plan.counts, strict=True))
            self.lengths = [n // table.every for n, _ in pairs]
            self.counts = [(n + c) // table.every - n // table.every for n, c in pairs]
        self.ends = [n + c for n, c in zip(self.lengths, self.counts, strict=True)]
        self.change = Change()
        # Where the past lies before pages change hands; a copy of those rows of the block table.
        self.before = table.blocks[plan.sequences] if self.joins else None

    def reserve(self) -> None:
        """Make the new rows writable. Raises StoreFullError, with part of the work done.

        Of sequences that share a page the last keeps it and writes there. The longest comes last,
        so that what it writes lies behind the rows of all: they may get the page back.
        """
        reserve, change = self.table.reserve, self.change
        wanted = zip(self.plan.sequences, self.lengths, self.counts, strict=True)
        for row in wanted if self.plan.uniform else sorted(wanted, key=itemgetter(1)):
            reserve(*row, change)

    def copy_shared(self, pool: Tensor) -> None:
        """Give the sequences of this step copies of the shared pages that they will write to."""
        if self.change.copies:
            paged = pool.unflatten(-2, (-1, self.table.page_size))
            sources, targets = staged(self.change.copies, pool.device).unbind(1)
            paged.index_copy_(-3, targets, paged.index_select(-3, sources))

    @property
    def joins(self) -> bool:
        """Whether more rows come than may be written before all of the past was read."""
        return not self.table.fits_ring(self.new)

    @cached_property
    def row(self) -> int | None:
        """First of the home rows that take the new rows of every sequence, if there are such."""
        plan, table = self.plan, self.table
        lined_up = self.at_home and plan.uniform and plan.full and not self.joins
        wraps = self.new > 1 and self._wrapped
        return table.home_row(self.lengths[0]) if lined_up and not wraps else None

    @cached_property
    def at_home(self) -> bool:
        """Whether the batch's rows are one view of the pool."""
        table, sequences = self.table, self.plan.sequences
        return self.plan.adjacent and table.has_homes and all(table.at_home[s] for s in sequences)

    @property
    def books(self) -> RowBooks:
        """The step's books on the device."""
        return self.plan.books.rows(self.table.key)

    def form(self) -> RowForm:
        """How this step stores and sees the table's rows; one object for all layers."""
        plan = self.plan
        if self.joins and (plan.kernels or plan.start or not plan.uniform):
            return Joined(self)
        if plan.kernels:
            return InPages(self.books, self.table.rows(plan.bound), True)
        if plan.uniform and plan.start == 0:
            return FromEmpty(self)
        if self.at_home:
            return self.form_at_home()
        return InPages(self.books, max(self.ends), False)

    # -- rows at home --------------------------------------------------------------------------

    def form_at_home(self) -> Plain | AtHome:
        """The form of sequences at home in a step that joins no rows."""
        visible, mask = self.visible_at_home()
        if self.row is not None:
            return Plain(self.row, self.counts[0], visible, mask)
        at, chosen = self.books.targets
        # In adjacent home ranges, of which the batch's view begins with the first.
        home_rows = self.table.home_rows
        at = at - self.plan.sequences[0] * home_rows
        return AtHome(at // home_rows, at % home_rows, chosen, visible, mask)

    @property
    def _wrapped(self) -> bool:
        return self.table.wraps and max(self.ends) > self.table.home_rows

    def visible_at_home(self) -> tuple[int, Tensor | None]:
        """How many home rows hold what the new tokens may see, and the mask over them."""
        end, window = max(self.ends), self.table.window
        if self._wrapped:
            return self.table.home_rows, self.mask_of(self._ring_positions())
        single = self.plan.uniform and self.plan.full and self.plan.new_tokens == 1
        if single and (window is None or end <= window):
            return end, None
        return end, self.mask_of(torch.arange(end, device=self.plan.device)[None])

    def _ring_positions(self) -> Tensor:
        """Absolute position of every home row, [B, rows]; stale rows lie before the window."""
        table, sinks = self.table, self.table.sink_pages
        last = ((torch.tensor(self.ends) - 1) // table.page_size - sinks)[:, None]
        ring = torch.arange(table.ring)[None]
        # Counted from the first page past the sinks; below it the ring has not come round yet.
        page = last - (last - ring) % table.ring
        page = torch.where(page >= 0, page + sinks, -1)
        page = torch.cat((torch.arange(sinks).expand(len(self.ends), -1), page), 1)
        position = page[:, :, None] * table.page_size + torch.arange(table.page_size)
        fresh = (page >= 0)[:, :, None]
        return torch.where(fresh, position, NEVER).flatten(1).to(self.plan.device)

    def mask_of(self, rows_at: Tensor) -> Tensor:
        """bool [1 or B, 1, K, S]: which rows, at positions [1 or B, S], each new token may see."""
        ends = (self.plan.positions + 1) // self.table.every
        return visible(rows_at, ends, self.table.window, self.table.sinks)


class FromEmpty:
    """Empty sequences: what is seen are the new rows themselves."""

    def __init__(self, step: RowStep) -> None:
        table, tokens = step.table, step.plan.new_tokens
        self._step = step
        self._count = tokens // table.every
        self._causal = table.every == 1 and (table.window is None or tokens <= table.window)
        self._mask = None
        if not self._causal:
            self._mask = step.mask_of(torch.arange(self._count, device=step.plan.device)[None])

    def append(self, held: Held, rows: Tensor) -> Seen:
        """As `RowForm.append`."""
        step = self._step
        if step.joins:
            step.copy_shared(held.pool)
        if step.row is not None and held.home is not None:
            new = step.counts[0]
            held.home.narrow(-2, step.row, new).copy_(first_rows(rows, new))
        else:
            step.books.write(held.pool, rows, newest=step.joins, kernels=False)
        causal = self._causal and step.plan.new_tokens > 1
        return Seen(first_rows(rows, self._count), self._mask, causal)


class Joined:
    """The visible past and the new rows side by side; then the store keeps what it keeps."""

    def __init__(self, step: RowStep) -> None:
        table, plan = step.table, step.plan
        assert table.window is not None and step.before is not None
        self._step = step
        oldest = [max(0, n - table.window + 1) for n in step.lengths]
        sunk = [min(table.sinks, first) for first in oldest]
        self._past = [s + n - first for s, n, first in zip(sunk, step.lengths, oldest, strict=True)]
        self._bound = self._size = max(self._past) + step.new
        if plan.kernels:
            self._size = -(-self._bound // JOINED_PAGE) * JOINED_PAGE
        # Rows after the sinks stand so many places before their positions.
        shift = [first - s for s, first in zip(sunk, oldest, strict=True)]
        self._shift = staged(shift, plan.device)[:, None]
        self._sunk = staged(sunk, plan.device)[:, None]
        self._blocks = torch.from_numpy(step.before).to(plan.device, non_blocking=True)

    @cached_property
    def _sources(self) -> Tensor:
        """Pool rows of the past, int64 [B, S]; beyond a sequence's own any."""
        places = torch.arange(max(self._past), device=self._shift.device)[None]
        at = places + self._shift * (places >= self._sunk)
        return pool_rows(self._blocks, at, self._step.table.page_size)

    @cached_property
    def _targets(self) -> Tensor:
        """Joined rows of the new ones, int64 [B * R]."""
        first = [b * self._size + n for b, n in enumerate(self._past)]
        new = torch.arange(self._step.new, device=self._shift.device)
        return (staged(first, new.device)[:, None] + new).flatten()

    @cached_property
    def _ends(self) -> Tensor:
        return self._step.books.ends - self._shift

    @cached_property
    def _mask(self) -> Tensor:
        table = self._step.table
        places = torch.arange(self._size, device=self._shift.device)[None]
        return visible(places, self._ends, table.window, table.sinks)

    def append(self, held: Held, rows: Tensor) -> Rows:
        """As `RowForm.append`."""
        step, pool, batch = self._step, held.pool, len(self._past)
        joined = pool.new_zeros(*pool.shape[:-2], batch, self._size, pool.shape[-1])
        if max(self._past):
            joined[..., : max(self._past), :] = pool[..., self._sources, :]
        flat = joined.flatten(-3, -2)
        flat.index_copy_(-2, self._targets, rows.flatten(0, 1).movedim(0, -2))
        step.copy_shared(pool)
        step.books.write(pool, rows, newest=True, kernels=step.plan.kernels)
        if not step.plan.kernels:
            return Seen(joined.movedim(-3, 0), self._mask, False)
        return PagedSeen(self._pages(flat), step.plan.new_tokens, self._bound)

    def _pages(self, pool: Tensor) -> Pages:
        step, table, device = self._step, self._step.table, pool.device
        count = self._size // JOINED_PAGE * len(self._past)
        past = staged(self._past, device, torch.int32)
        return Pages(
            pool=pool, past=past, total=past + step.new, new=step.books.valid,
            table=torch.arange(count, dtype=torch.int32, device=device).view(len(self._past), -1),
            page_size=JOINED_PAGE, window=table.window, sinks=table.sinks,
            ends=self._ends if table.every > 1 else None,
        )  # fmt: skip


def first_rows(rows: Tensor, count: int) -> Tensor:
    """[B, R, *planes, row] -> [B, *planes, count, row], a view of the first ones."""
    last = rows if rows.dim() == 3 else rows.movedim(1, -2)
    return last if count == rows.shape[1] else last.narrow(-2, 0, count)
