"""A step's books as tensors: what kernels, and torch forms that gather, read of a step.

The host keeps the books (`infer.pages`, `infer.slots`) and never waits for the device: lengths and
slots are sent with every step, entries of block tables when a sequence gains a page. All shapes
depend on the batch alone, so a step can be captured in a CUDA graph and replayed.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.state import Pages
from infer.pages import PageTable, TableKey
from infer.rings import RingChange
from infer.slots import SlotChange
from kernels.rope.torch import rope_table

#: Counters per sequence for steps whose programs count arrivals: one for each norm.
ARRIVALS_PER_SEQUENCE = 1024


#: Numbers of a step, one for each sequence; what each token writes follows them.
SECTIONS = 8


class Padding(NamedTuple):
    """What a batch is padded with: a sequence of nobody, and the slots that nobody reads."""

    sequence: int
    slot: int
    ring: int


def staged(
    values: Sequence[object], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A few numbers as a tensor on a device; nobody waits for it, the driver stages the copy."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


#: What rotary angles depend on beside positions: dim, theta and turned of `LayerState.rope`.
Rotary = tuple[int, float, int | None]


class OnDevice:
    """What all steps of a store share on its device: block tables and rotary tables."""

    def __init__(
        self, tables: dict[TableKey, PageTable], sequences: int, max_context: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.device = device
        self.max_context = max_context
        self.tables = tables
        # On the host itself the block tables are those of the books, not copies of them.
        self.blocks = {key: torch.from_numpy(t.blocks).to(device) for key, t in tables.items()}
        self._sequences = sequences
        #: What layers have asked `rotary` for, by its arguments.
        self.angles: dict[Rotary, Tensor] = {}

    @cached_property
    def arrivals(self) -> Tensor:
        """int32 zeros that kernels count in and leave at zero."""
        size = (self._sequences * 5 // 4 + 2) * ARRIVALS_PER_SEQUENCE
        return torch.zeros(size, dtype=torch.int32, device=self.device)

    def update(self) -> None:
        """Send the entries of block tables that have changed."""
        for key, table in self.tables.items():
            if table.changed and self.device.type != "cpu":
                at = torch.tensor(list(table.changed)).t()
                held = torch.from_numpy(table.blocks)[at[0], at[1]]
                sent = torch.cat((at, held[None].long())).to(self.device, non_blocking=True)
                self.blocks[key][sent[0], sent[1]] = sent[2].int()
            table.changed.clear()

    def rotary(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """Cosines and sines of all positions, float32 [>= max_context, dim/2, 2]."""
        found = self.angles.get((dim, theta, turned))
        if found is None:
            table = rope_table(self.max_context, dim, theta, self.device, turned)
            found = torch.view_as_real(table).squeeze(1).contiguous()
            self.angles[dim, theta, turned] = found
        return found


def book(
    sequences: Sequence[int], lengths: Sequence[int], counts: Sequence[int], new_tokens: int,
    slots: SlotChange | None, rings: RingChange | None, *, padded: int, padding: Padding,
) -> Tensor:  # fmt: skip
    """The books of a step as one int32 tensor on the host; `Books` takes it apart.

    padded: sequences of the batch, those of padding included.
    """
    size, more = _padded(padded), padded - len(sequences)
    rows = [
        [*sequences, *[padding.sequence] * more],
        [*lengths, *[0] * more],
        [*counts, *[new_tokens] * more],
    ]
    books = torch.zeros(SECTIONS * size + _padded(padded * new_tokens), dtype=torch.int32)
    nothing = [0] * padded
    if slots is None:
        rows += [nothing, nothing]
    else:
        slot = padding.slot
        rows += [[*slots.read, *[slot] * more], [*slots.last, *[slot] * more]]
        last = [*[-1] * (new_tokens - 1), slot]
        written = [at for row in slots.write for at in row] + last * more
        end = SECTIONS * size + len(written)
        books[SECTIONS * size : end] = torch.tensor(written, dtype=torch.int32)
    if rings is not None:
        rows += [
            [*rings.slot, *[padding.ring] * more],
            [*rings.held, *[0] * more],
            [*rings.fold, *[0] * more],
        ]
    books[: SECTIONS * size].view(SECTIONS, size)[: len(rows), :padded] = torch.tensor(
        rows, dtype=torch.int32
    )
    return books


def _padded(size: int) -> int:
    """Sections start at 16 bytes whatever the batch: kernels are compiled for that."""
    return -(-size // 4) * 4


class Books:
    """A step's books on the device, and what follows from them.

    sequence, past, count, read, last: int32 [B]; write: int32 [B, K]. See `archs.state.Slots`.
    ring, held, fold: int32 [B]. See `archs.state.Replayed`.
    ragged: whether `count` may be less than K.
    """

    def __init__(
        self, shared: OnDevice, tensor: Tensor, batch: int, new_tokens: int, *, ragged: bool
    ) -> None:
        self.shared = shared
        self.new_tokens = new_tokens
        self.ragged = ragged
        size = _padded(batch)
        rows = tensor[: SECTIONS * size].view(SECTIONS, size)[:, :batch].unbind(0)
        self.sequence, self.past, self.count, self.read, self.last = rows[:5]
        self.ring, self.held, self.fold = rows[5:]
        end = SECTIONS * size + batch * new_tokens
        self.write = tensor[SECTIONS * size : end].view(batch, new_tokens)
        self._rows: dict[TableKey, RowBooks] = {}

    @cached_property
    def new(self) -> Tensor | None:
        """Valid new tokens, int64 [B]; None when all are valid."""
        return self.count.long() if self.ragged else None

    @cached_property
    def valid(self) -> Tensor | None:
        """bool [B, K]; None when all new tokens are valid."""
        if not self.ragged:
            return None
        return torch.arange(self.new_tokens, device=self.past.device) < self.count[:, None]

    @cached_property
    def positions(self) -> Tensor:
        """Absolute positions of the new tokens, int64 [B, K]."""
        new = torch.arange(self.new_tokens, device=self.past.device)
        return self.past.long()[:, None] + new

    @cached_property
    def read_at(self) -> Tensor:
        """`read` as an index, int64 [B]."""
        return self.read.long()

    @cached_property
    def last_at(self) -> Tensor:
        """`last` as an index, int64 [B]."""
        return self.last.long()

    def write_at(self, padding: int) -> Tensor:
        """`write` as an index, int64 [B * K]; values that are not kept go to the slot `padding`."""
        return self.write.long().masked_fill(self.write < 0, padding).flatten()

    @cached_property
    def sequence_at(self) -> Tensor:
        """`sequence` as an index, int64 [B]."""
        return self.sequence.long()

    def rows(self, key: TableKey) -> "RowBooks":
        """The same for the rows of one block table."""
        found = self._rows.get(key)
        if found is None:
            self._rows[key] = found = RowBooks(self, self.shared.tables[key])
        return found


class RowBooks:
    """A step's books, counted in the rows of one block table.

    new: rows of the padded batch.
    """

    def __init__(self, books: Books, table: PageTable) -> None:
        self.books = books
        self.table = table
        self.new = -(-books.new_tokens // table.every)

    @cached_property
    def before(self) -> Tensor:
        """Rows of each sequence before the step, int32 [B]."""
        past = self.books.past
        return past if self.table.every == 1 else past // self.table.every

    @cached_property
    def after(self) -> Tensor:
        """Rows after it, padding included, int32 [B]."""
        after = self.books.past + self.books.new_tokens
        return after if self.table.every == 1 else after // self.table.every

    @cached_property
    def valid(self) -> Tensor | None:
        """New rows of each sequence, int32 [B]; None where all `new` are."""
        books = self.books
        if self.table.every == 1:
            return books.count if books.ragged else None
        return (books.past + books.count) // self.table.every - self.before

    @cached_property
    def blocks(self) -> Tensor:
        """The batch's block table, int32 [B, pages]."""
        found = self.books.shared.blocks[self.table.key][self.books.sequence_at]
        # Padded rows may lie past the last page; kernels look it up before they mask.
        more = -(-self.new // self.table.page_size)
        return found if self.valid is None else F.pad(found, (0, more))

    @cached_property
    def ends(self) -> Tensor:
        """Before which row each new token sees, int64 [B, K]."""
        return (self.books.positions + 1) // self.table.every

    @cached_property
    def kept_from(self) -> Tensor:
        """The oldest of the new rows that a window's ring keeps, int32 [B]."""
        count = self.new if self.valid is None else self.valid
        back = (self.table.window or 0) + max(0, self.table.lookback - 1)
        return (self.before + count - back).clamp(min=0)

    def pages(self, pool: Tensor) -> Pages:
        """A pool as kernels read and write it."""
        table = self.table
        return Pages(
            pool=pool, table=self.blocks, past=self.before, total=self.after, new=self.valid,
            page_size=table.page_size, window=table.window, sinks=table.sinks,
            ends=self.ends if table.every > 1 else None,
        )  # fmt: skip

    def write(self, pool: Tensor, rows: Tensor, *, newest: bool, kernels: bool) -> None:
        """Write new rows [B, R, *planes, row] into a pool; newest: those that a ring keeps.

        Codes that are made already are moved without a kernel.
        """
        if kernels and rows.dtype != torch.uint8:
            from kernels.pages.write import page_write

            page_write(
                rows, pool, self.blocks, self.before, page_size=self.table.page_size,
                new=self.valid, sinks=self.table.sinks,
                first_kept=self.kept_from if newest else None,
            )  # fmt: skip
            return
        at, chosen = self._newest_targets if newest else self.targets
        flat = rows.flatten(0, 1)
        pool.index_copy_(-2, at, (flat if chosen is None else flat[chosen]).movedim(0, -2))

    def write_codes(self, pool: Tensor, scales: Tensor, rows: Tensor) -> None:
        """Write new rows as 8-bit codes of the pool's dtype, and scales [*planes, rows]."""
        from kernels.pages.write import page_write

        page_write(
            rows, pool, self.blocks, self.before, page_size=self.table.page_size, new=self.valid,
            sinks=self.table.sinks, scales=scales,
        )  # fmt: skip

    @cached_property
    def targets(self) -> tuple[Tensor, Tensor | None]:
        """Pool rows to write, and which of the flattened [B*R] new rows go there (None: all)."""
        return self._chosen(newest=False)

    @cached_property
    def _newest_targets(self) -> tuple[Tensor, Tensor | None]:
        return self._chosen(newest=True)

    def _chosen(self, *, newest: bool) -> tuple[Tensor, Tensor | None]:
        new = torch.arange(self.new, device=self.before.device)
        at = self.before.long()[:, None] + new
        keep = None if self.valid is None else new < self.valid[:, None]
        if newest:
            late = (at >= self.kept_from[:, None]) | (at < self.table.sinks)
            keep = late if keep is None else keep & late
        target = pool_rows(self.blocks, at, self.table.page_size).flatten()
        if keep is None:
            return target, None
        chosen = keep.flatten().nonzero().squeeze(1)
        return target[chosen], chosen


def pool_rows(blocks: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Pool rows, int64 [B, N], of positions [B, N] behind a block table int32 [B, pages]."""
    page = (positions // page_size).clamp(max=blocks.shape[1] - 1)
    return blocks.long().gather(1, page) * page_size + positions % page_size
