"""Where one step's new rows go in a block table, and which rows its tokens may look at."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from archs.spec import NEVER, Seen
from infer.pages import Change, PageTable

if TYPE_CHECKING:
    from infer.view import StepView


class TableStep:
    """Write and read plan of one block table in one step."""

    def __init__(self, step: "StepView", table: PageTable) -> None:
        self.step = step
        self.table = table
        new = step.new_tokens
        self.from_empty = step.uniform and step.start == 0
        self.joins = not table.fits_ring(new) and not self.from_empty
        self._past: tuple[Tensor, Tensor] | None = self._past_rows() if self.joins else None
        # Copies of shared pages wait for `write`: a page freed here may still hold somebody's past.
        self.change = Change()
        self._target: tuple[Tensor, Tensor | slice] | None = None
        self._gather: tuple[Tensor, Tensor] | None = None
        self._mask: Tensor | None = None
        self._masked = False

    def reserve(self) -> None:
        """Make the new rows writable, and see what lies where. Raises StoreFullError."""
        step, table, new = self.step, self.table, self.step.new_tokens
        for slot, length, count in zip(step.slots, step.lengths, step.counts, strict=True):
            table.reserve(slot, length, count, self.change)
        self.identity = (
            step.adjacent and table.has_homes and all(table.at_home[s] for s in step.slots)
        )
        self.end = max(n + c for n, c in zip(step.lengths, step.counts, strict=True))
        self.wrapped = table.wraps and self.end > table.rows_per_slot
        #: First of the adjacent home rows that take the new rows of every sequence, if there are.
        self.row: int | None = None
        if self.identity and step.uniform and step.full and (new == 1 or not self.wrapped):
            self.row = table.home_row(step.start) if table.fits_ring(new) else None

    # -- writing -----------------------------------------------------------------------------

    def write(self, pool: Tensor, home: Tensor | None, rows: Tensor) -> None:
        """Write new rows [B, K, *planes, row] into a pool [*planes, rows, row]."""
        step = self.step
        self.copy_shared(pool)
        if self.row is not None and home is not None:
            home.narrow(-2, self.row, step.new_tokens).copy_(rows_last(rows))
            return
        at, chosen = self._targets()
        flat = rows.flatten(0, 1)
        if not isinstance(chosen, slice):
            flat = flat[chosen]
        pool.index_copy_(pool.dim() - 2, at, flat.movedim(0, -2))

    @property
    def shares(self) -> bool:
        """Whether pages that are shared must be copied before they are written to."""
        return bool(self.change.copies)

    def copy_shared(self, pool: Tensor) -> None:
        """Give the sequences of this step copies of the shared pages that they will write to."""
        size = self.table.page_size
        for source, target in self.change.copies:
            copied = pool[..., source * size : (source + 1) * size, :]
            pool[..., target * size : (target + 1) * size, :] = copied

    def _targets(self) -> tuple[Tensor, Tensor | slice]:
        """Pool rows to write, and which of the flattened [B*K] new rows go there."""
        if self._target is None:
            step, table = self.step, self.table
            targets, chosen = [], []
            for b, (slot, length, count) in enumerate(
                zip(step.slots, step.lengths, step.counts, strict=True)
            ):
                positions = torch.arange(length, length + count)
                kept = positions
                if not table.fits_ring(step.new_tokens):
                    first = table.first_kept(length + count)
                    kept = positions[(positions >= first) | (positions < table.sinks)]
                targets.append(table.rows(slot, kept))
                chosen.append(kept - length + b * step.new_tokens)
            index = torch.cat(chosen)
            every = index.numel() == len(step.slots) * step.new_tokens
            self._target = (
                torch.cat(targets).to(step.device),
                slice(None) if every else index.to(step.device),
            )
        return self._target

    # -- reading -----------------------------------------------------------------------------

    def append(self, pool: Tensor, home: Tensor | None, rows: Tensor) -> Seen:
        """Write new rows and return [B, *planes, S, row] of all that they may see.

        home: the batch's own rows of the pool, [B, *planes, rows_per_slot, row], where `identity`.
        """
        if self.from_empty:
            self.write(pool, home, rows)
            if self.step.new_tokens == 1:
                return Seen(rows_last(rows), None, False)
            window = self.table.window
            if window is None or self.step.new_tokens <= window:
                return Seen(rows_last(rows), None, True)
            return Seen(rows_last(rows), self._mask_of(self.step.positions), False)
        if self._past is not None:
            index, positions = self._past
            past = pool[..., index, :].movedim(-3, 0)
            self.write(pool, home, rows)
            seen = torch.cat((past, rows_last(rows)), -2)
            joined = torch.cat((positions, self.step.positions.expand(positions.shape[0], -1)), 1)
            return Seen(seen, self._mask_of(joined), False)
        self.write(pool, home, rows)
        return self._read(pool, home)

    def _read(self, pool: Tensor, home: Tensor | None) -> Seen:
        """All rows that the new tokens may see, themselves included."""
        if home is not None:
            count, mask = self.visible()
            return Seen(home.narrow(-2, 0, count), mask, False)
        if self._gather is None:
            self._gather = self._gather_rows()
        index, positions = self._gather
        return Seen(pool[..., index, :].movedim(-3, 0), self._mask_of(positions), False)

    def visible(self) -> tuple[int, Tensor | None]:
        """How many home rows hold what the new tokens may see, and the mask over them."""
        if self.wrapped:
            return self.table.rows_per_slot, self._mask_of(self._ring_positions())
        plain = self.step.uniform and self.step.full and self.step.new_tokens == 1
        if plain and (self.table.window is None or self.end <= self.table.window):
            return self.end, None
        positions = torch.arange(self.end, device=self.step.device)[None]
        return self.end, self._mask_of(positions)

    def _ring_positions(self) -> Tensor:
        """Absolute position of every home row, [B, rows]; stale rows lie before the window."""
        table, step = self.table, self.step
        sinks = table.sink_pages
        ends = torch.tensor([n + c for n, c in zip(step.lengths, step.counts, strict=True)])
        last = ((ends - 1) // table.page_size - sinks)[:, None]
        ring = torch.arange(table.ring)[None]
        # Counted from the first page past the sinks; below it the ring has not come round yet.
        page = last - (last - ring) % table.ring
        page = torch.where(page >= 0, page + sinks, -1)
        page = torch.cat((torch.arange(sinks).expand(len(step.slots), -1), page), 1)
        position = page[:, :, None] * table.page_size + torch.arange(table.page_size)
        fresh = (page >= 0)[:, :, None]
        return torch.where(fresh, position, NEVER).flatten(1).to(step.device)

    def _span(self, oldest: Sequence[int], ends: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pool rows and absolute positions [B, S] of the sinks and of positions oldest..end."""
        table = self.table
        index, positions = [], []
        for slot, first, end in zip(self.step.slots, oldest, ends, strict=True):
            sinks = torch.arange(min(table.sinks, first))
            at = torch.cat((sinks, torch.arange(first, end)))
            index.append(table.rows(slot, at))
            positions.append(at)
        device = self.step.device
        return (
            pad_sequence(index, batch_first=True).to(device),
            pad_sequence(positions, batch_first=True, padding_value=NEVER).to(device),
        )

    def _past_rows(self) -> tuple[Tensor, Tensor]:
        return self._span(self._oldest(), self.step.lengths)

    def _oldest(self) -> list[int]:
        """The oldest position within the window of each sequence's first new token."""
        window = self.table.window
        return [0 if window is None else max(0, n - window + 1) for n in self.step.lengths]

    def past_to_join(self) -> tuple[Tensor | None, list[int]]:
        """Pool rows [B, S] of the past that a joining step sees, and how many each sequence has."""
        if self._past is None:
            return None, [0] * len(self.step.slots)
        pairs = zip(self._oldest(), self.step.lengths, strict=True)
        return self._past[0], [min(self.table.sinks, first) + n - first for first, n in pairs]

    def _gather_rows(self) -> tuple[Tensor, Tensor]:
        ends = [n + c for n, c in zip(self.step.lengths, self.step.counts, strict=True)]
        return self._span(self._oldest(), ends)

    def _mask_of(self, rows_at: Tensor) -> Tensor | None:
        """bool [1 or B, 1, K, S]: rows at positions [1 or B, S] against the new tokens'."""
        if not self._masked:
            at = self.step.positions[:, :, None]
            row = rows_at[:, None, :]
            mask = row <= at
            if self.table.window is not None:
                near = row > at - self.table.window
                mask &= near | (row < self.table.sinks)
            self._mask = mask.unsqueeze(1)
            self._masked = True
        return self._mask


def rows_last(rows: Tensor) -> Tensor:
    """[B, K, *planes, row] -> [B, *planes, K, row]."""
    return rows if rows.dim() == 3 else rows.movedim(1, -2)
