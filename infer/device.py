"""A step as kernels see it: block tables, lengths and slots as tensors on the device.

The host keeps the books (`infer.pages`) and never waits for the device: what changed is sent
along, lengths and slots with every step, a block table when its sequence gains a page. All shapes
depend on the batch alone, so a step can be captured in a CUDA graph and replayed.

Steps too long for a window's ring join the past with the new rows in pages of their own.
"""

from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.spec import LayerState, PagedSeen, Pages, Rows, Slots
from infer.fit import require_dtype, require_fit, rows_shape
from infer.store import StateStore, TableKey
from infer.table_step import TableStep
from infer.view import StepView, keeps_each
from kernels.rope import rope_table

#: Counters per sequence for steps whose programs count arrivals: one for each norm.
ARRIVALS_PER_SEQUENCE = 1024
#: Page of rows that are joined for one step only.
JOINED_PAGE = 64


class DeviceState:
    """The device side of a store: block tables and rotary tables that all steps share."""

    def __init__(self, store: StateStore) -> None:
        self.store = store
        device = store.device
        self.max_pages = -(-store.max_context // store.page_size)
        slots = len(store.lengths)
        self.tables: dict[TableKey, Tensor] = {
            key: torch.zeros(slots, self.max_pages, dtype=torch.int32, device=device)
            for key in store.tables
        }
        self.arrivals = torch.zeros(slots * ARRIVALS_PER_SEQUENCE, dtype=torch.int32, device=device)
        self._rotary: dict[tuple[int, float], Tensor] = {}

    def send(self, step: StepView) -> Tensor:
        """Bring the device up to date for a step; returns int32 [3, >= B]: slots, past, new.

        Small copies from pageable memory: the driver stages them and does not wait for the device.
        """
        # From here on kernels write where they please.
        step.wrote_rows = step.wrote_fixed = True
        for key, table in self.store.tables.items():
            for slot in table.changed:
                row = table.row_of(slot, self.max_pages)
                self.tables[key][slot].copy_(row, non_blocking=True)
            table.changed.clear()
        # Copy-on-write, before any layer runs; steps that join rows do it as they write.
        step.copy_shared(joined=False)
        batch = len(step.slots)
        # Rows start at 16 bytes whatever the batch: kernels are compiled for that.
        books = torch.zeros(3, -(-batch // 4) * 4, dtype=torch.int32)
        books[:, :batch] = torch.tensor([step.slots, step.lengths, step.counts])
        return books.to(step.device, non_blocking=True)

    def rotary(self, dim: int, theta: float) -> Tensor:
        """Cosines and sines of all positions, float32 [>= max_context, dim/2, 2]."""
        found = self._rotary.get((dim, theta))
        if found is None:
            table = rope_table(self.store.max_context, dim, theta, self.store.device)
            found = torch.view_as_real(table).squeeze(1).contiguous()
            self._rotary[dim, theta] = found
        return found


def joins(table: TableStep) -> bool:
    """Whether a step brings more rows than may be written before all of the past was read."""
    return not table.table.fits_ring(table.step.new_tokens)


class DeviceStep:
    """An open step whose layer states are tensors on the device.

    books: int32 [3, >= B]: slots, tokens before the step, valid new tokens.
    bound: most tokens that a sequence holds after the step, from the host's books.
    host:  the open step; None where a graph is captured, whose steps are all short and full.
    """

    def __init__(
        self,
        state: DeviceState,
        books: Tensor,
        batch: int,
        new_tokens: int,
        bound: int,
        host: StepView | None,
    ) -> None:
        self.state = state
        self.store = state.store
        self.new_tokens = new_tokens
        self.bound = bound
        self.host = host
        self.slots32, self.past, count = (row[:batch] for row in books.unbind(0))
        self.new32 = None if host is None or host.full else count
        self.each = keeps_each(self.store.lookback, new_tokens)

    def close(self) -> None:
        """Part with the layers' views, which point back here, and with the open step."""
        self.__dict__.pop("_views", None)
        self.host = None

    @cached_property
    def slots(self) -> Tensor:
        """int64 [B]."""
        return self.slots32.long()

    @cached_property
    def total(self) -> Tensor:
        """Tokens after the step, padding included, int32 [B]."""
        return self.past + self.new_tokens

    @cached_property
    def count(self) -> Tensor:
        """Valid new tokens, int64 [B]."""
        full = torch.full_like(self.past, self.new_tokens)
        return (full if self.new32 is None else self.new32).long()

    @cached_property
    def positions(self) -> Tensor:
        """Absolute positions of the new tokens, int64 [B, K]."""
        return self.past.long()[:, None] + torch.arange(self.new_tokens, device=self.past.device)

    @cached_property
    def valid(self) -> Tensor | None:
        """bool [B, K]; None when all new tokens are valid."""
        if self.new32 is None:
            return None
        return torch.arange(self.new_tokens, device=self.past.device) < self.new32[:, None]

    @cached_property
    def tables(self) -> dict[TableKey, Tensor]:
        """This batch's block tables, int32 [B, max_pages]."""
        tables = {key: table[self.slots] for key, table in self.state.tables.items()}
        if self.new32 is not None:
            # Padded tokens may lie past the last page; kernels look it up before they mask.
            more = -(-self.new_tokens // self.store.page_size)
            tables = {key: F.pad(table, (0, more)) for key, table in tables.items()}
        return tables

    @property
    def gathered(self) -> bool:
        """Whether some layer asked for rows instead of leaving them to a kernel."""
        return any(layer.gathered for layer in self._views)

    @property
    def layers(self) -> list[LayerState]:
        """One state per layer, to hand to `Mixer.extend`."""
        return cast(list[LayerState], self._views)

    @cached_property
    def _views(self) -> list["_DeviceLayer"]:
        views: list[_DeviceLayer] = []
        for index, spec in enumerate(self.store.specs):
            owner = None if spec.owner is None else views[spec.owner]
            views.append(_DeviceLayer(self, index, owner))
        return views


class _DeviceLayer:
    """One layer's `KernelState`."""

    def __init__(self, step: DeviceStep, index: int, owner: "_DeviceLayer | None") -> None:
        self.step = step
        self.index = index
        self.owner = owner
        self.each = step.each
        self._seen: dict[str, PagedSeen] = {}

    @property
    def new(self) -> Tensor | None:
        return None if self.step.new32 is None else self.step.count

    @property
    def valid(self) -> Tensor | None:
        return self.step.valid

    @property
    def positions(self) -> Tensor:
        return self.step.positions

    @property
    def past(self) -> Tensor:
        return self.step.past

    def rope(self, dim: int, theta: float) -> Tensor:
        store = self.step.store
        end = max(store.max_context, self.step.bound)
        return rope_table(end, dim, theta, store.device)[self.step.positions]

    def rotary(self, dim: int, theta: float) -> Tensor:
        return self.step.state.rotary(dim, theta)

    # -- rows per token --------------------------------------------------------------------------

    @property
    def _joins(self) -> TableStep | None:
        host, spec = self.step.host, self.step.store.specs[self.index]
        if host is None or not joins(host.tables[spec.window, spec.sinks]):
            return None
        return host.tables[spec.window, spec.sinks]

    @property
    def gathered(self) -> bool:
        return any(seen.gathered for seen in self._seen.values())

    def pages(self, name: str, dtype: torch.dtype) -> Pages | None:
        if name not in self.step.store.pools[self.index]:
            raise ValueError(f"layer {self.index} declares no per-token tensor '{name}' of its own")
        require_dtype(self.index, name, dtype, self.step.store.pools[self.index][name])
        if self._joins is not None:
            return None
        step, spec = self.step, self.step.store.specs[self.index]
        return Pages(
            pool=step.store.pools[self.index][name],
            table=step.tables[spec.window, spec.sinks],
            past=step.past,
            total=step.total,
            new=step.new32,
            page_size=step.store.page_size,
            window=spec.window,
            sinks=spec.sinks,
        )

    def written(self, name: str) -> Rows:
        pages = self.pages(name, self.step.store.pools[self.index][name].dtype)
        assert pages is not None
        return self._see(name, pages, self.step.bound)

    def append(self, name: str, rows: Tensor) -> Rows:
        pages = self.pages(name, rows.dtype)
        pool = self.step.store.pools[self.index][name]
        batch = self.step.slots32.shape[0], self.step.new_tokens
        require_fit(self.index, name, rows, (*batch, *rows_shape(pool)), pool)
        if pages is None:
            return self._join(name, rows)
        from kernels.page_write import page_write

        page_write(
            rows, pages.pool, pages.table, pages.past, page_size=pages.page_size, new=pages.new
        )
        return self._see(name, pages, self.step.bound)

    def seen(self, name: str) -> Rows:
        return (self.owner or self)._seen[name]

    def _see(self, name: str, pages: Pages, bound: int) -> PagedSeen:
        self._seen[name] = seen = PagedSeen(pages, self.step.new_tokens, bound)
        return seen

    def _join(self, name: str, rows: Tensor) -> Rows:
        """The visible past and the new rows side by side; then the store keeps what it keeps."""
        table, new = self._joins, self.step.new_tokens
        assert table is not None
        pool = self.step.store.pools[self.index][name]
        index, lengths = table.past_to_join()
        bound = max(lengths) + new
        pages = -(-bound // JOINED_PAGE)
        fresh = rows.movedim((0, 1), (-3, -2))
        batch, size = len(lengths), pages * JOINED_PAGE
        joined = pool.new_zeros(*pool.shape[:-2], batch, size, pool.shape[-1])
        if index is not None:
            joined[..., : index.shape[1], :] = pool[..., index, :]
        for b, start in enumerate(lengths):
            joined[..., b, start : start + new, :] = fresh[..., b, :, :]
        self._keep_newest(table, rows, pool)
        spec, device = self.step.store.specs[self.index], pool.device
        past = torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)
        paged = Pages(
            pool=joined.flatten(-3, -2),
            table=torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, -1),
            past=past,
            total=past + new,
            new=self.step.new32,
            page_size=JOINED_PAGE,
            window=spec.window,
            sinks=spec.sinks,
        )
        return self._see(name, paged, bound)

    def _keep_newest(self, table: TableStep, rows: Tensor, pool: Tensor) -> None:
        """Write those of the new rows that the window's ring keeps."""
        from kernels.page_write import page_write

        step, spec = self.step, self.step.store.specs[self.index]
        ends = [n + c for n, c in zip(table.step.lengths, table.step.counts, strict=True)]
        kept = torch.tensor([table.table.first_kept(end) for end in ends], dtype=torch.int32)
        table.copy_shared(pool)
        page_write(
            rows, pool, step.tables[spec.window, spec.sinks], step.past,
            page_size=step.store.page_size, new=step.new32, sinks=spec.sinks,
            first_kept=kept.to(pool.device, non_blocking=True),
        )  # fmt: skip

    # -- one tensor per sequence -----------------------------------------------------------------

    def slots(self, name: str) -> Slots:
        step, pool = self.step, self.step.store.slots[self.index][name]
        each = None
        if step.each:
            batch = step.slots32.shape[0]
            each = pool.new_empty(batch, step.new_tokens, *pool.shape[1:])
        return Slots(
            pool=pool, slots=step.slots32, new=step.new32, each=each, arrivals=step.state.arrivals
        )

    def settle(self, name: str, slots: Slots) -> None:
        if slots.each is not None:
            self._remember(name, slots.each)
        elif self.step.store.lookback:
            self._keep(name)

    def get(self, name: str) -> Tensor:
        return self.step.store.slots[self.index][name][self.step.slots]

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        step = self.step
        pool = step.store.slots[self.index][name]
        batch = step.slots32.shape[0]
        require_fit(self.index, name, value, (batch, *pool.shape[1:]), pool)
        pool.index_copy_(0, step.slots, value)
        if step.each:
            if each is None:
                raise ValueError(f"'{name}' needs its value after each token (state.each)")
            require_fit(self.index, name, each, (batch, step.new_tokens, *pool.shape[1:]), pool)
            self._remember(name, each)
        elif step.store.lookback:
            self._keep(name)

    def _remember(self, name: str, each: Tensor) -> None:
        """Keep the value after each valid token of [B, K, ...] for a rollback."""
        step = self.step
        ring, pool = step.store.history[self.index][name], step.store.slots[self.index][name]
        tokens = torch.arange(step.new_tokens, device=each.device)
        # Padding repeats the last valid token, so that it overwrites nothing that is older.
        at = torch.minimum(tokens, step.count[:, None] - 1)
        batch = torch.arange(each.shape[0], device=each.device)[:, None]
        empty = (step.count == 0).reshape(-1, *[1] * (each.dim() - 1))
        value = torch.where(empty, pool[step.slots][:, None], each[batch, at.clamp(min=0)])
        length = step.past.long()[:, None] + at + 1
        ring[step.slots[:, None], length % ring.shape[1]] = value

    def _keep(self, name: str) -> None:
        """Keep the value after the whole step for a rollback."""
        step = self.step
        ring, pool = step.store.history[self.index][name], step.store.slots[self.index][name]
        length = step.past.long() + step.count
        ring[step.slots, length % ring.shape[1]] = pool[step.slots]


def view(state: DeviceState, step: StepView) -> DeviceStep:
    """An open step on the device, its books sent."""
    bound = max(n + step.new_tokens for n in step.lengths)
    return DeviceStep(state, state.send(step), len(step.slots), step.new_tokens, bound, step)
