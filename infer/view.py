"""One step as the layers see it: where new rows go, which rows they may look at, positions.

Everything that layers share (positions, rotary angles, write indices, masks) is made once per
step. A batch whose slots are adjacent and whose pages are at home reads the pool as one strided
view; any other batch gathers. New rows are written before they are read, except when more come
than a window's ring can hold: then the past is gathered first and joined with them.
"""

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from archs.recurrent import RECURRENT_LIMIT
from archs.spec import LayerState, Seen, StateSpec
from infer.fit import require_fit, rows_shape
from infer.pages import PageTable
from infer.table_step import TableStep
from kernels.rope import rope_table


class Store(Protocol):
    """What a step needs of the store that it is a view of; `infer.store` says what each is."""

    specs: list[StateSpec]
    device: torch.device
    max_context: int
    lookback: int
    lengths: list[int]
    oldest: list[int]
    tables: dict[tuple[int | None, int], PageTable]
    pools: list[dict[str, Tensor]]
    slots: list[dict[str, Tensor]]
    history: list[dict[str, Tensor]]

    def home(self, layer: int, name: str, first: int, count: int) -> Tensor:
        """The home rows of `count` slots."""
        ...


def keeps_each(lookback: int, new_tokens: int) -> bool:
    """Whether a step must give its fixed state after every token, so that it can be rolled back.

    Steps beyond the recurrent form have no states between: what they end in is kept alone.
    """
    return lookback > 0 and new_tokens <= min(lookback + 1, RECURRENT_LIMIT)


class StepView:
    """An open step of K new tokens for the sequences in `slots`."""

    def __init__(self, store: Store, slots: list[int], new_tokens: int, counts: list[int]) -> None:
        self.store = store
        self.slots = slots
        self.new_tokens = new_tokens
        self.counts = counts
        self.device = store.device
        self.lengths = [store.lengths[s] for s in slots]
        self.start = self.lengths[0]
        self.uniform = all(n == self.start for n in self.lengths)
        self.full = all(c == new_tokens for c in counts)
        self.adjacent = slots == list(range(slots[0], slots[0] + len(slots)))
        self._rope: dict[tuple[int, float], Tensor] = {}
        device = self.device
        self.new = None if self.full else torch.tensor(counts, device=device)
        self.valid = None
        if self.new is not None:
            self.valid = torch.arange(new_tokens, device=device) < self.new[:, None]
        self.each = keeps_each(store.lookback, new_tokens)
        #: Whether rows, and fixed tensors, may have been written to: what cannot be undone.
        self.wrote_rows = self.wrote_fixed = False
        self.committed = False
        self.tables = {key: TableStep(self, table) for key, table in store.tables.items()}

    def reserve(self) -> None:
        """Make the new rows writable. Raises StoreFullError, with part of the work done."""
        for table in self.tables.values():
            table.reserve()

    def copy_shared(self, *, joined: bool = True) -> None:
        """Copy what is shared and will be written to; joined: in steps that join rows, too."""
        self.wrote_rows = True
        for spec, pools in zip(self.store.specs, self.store.pools, strict=True):
            if spec.owner is None and spec.per_token:
                table = self.tables[spec.window, spec.sinks]
                if table.shares and (joined or table.table.fits_ring(self.new_tokens)):
                    for pool in pools.values():
                        table.copy_shared(pool)

    def close(self) -> None:
        """Part with the layers' and tables' views, which point back here: what a finished step
        held is free at once, not when the garbage collector finds the circle.
        """
        self.__dict__.pop("layers", None)
        self.tables.clear()

    @cached_property
    def positions(self) -> Tensor:
        """Absolute positions of the new tokens, int64 [1 or B, K]."""
        new = torch.arange(self.new_tokens, device=self.device)
        if self.uniform:
            return (new + self.start).unsqueeze(0)
        return torch.tensor(self.lengths, device=self.device)[:, None] + new

    @cached_property
    def layers(self) -> list[LayerState]:
        """One LayerState per layer, to hand to `Mixer.extend`."""
        views: list[_LayerView] = []
        for index, spec in enumerate(self.store.specs):
            if spec.owner is not None:
                views.append(_LayerView(self, index, None, views[spec.owner]))
            else:
                table = self.tables[spec.window, spec.sinks] if spec.per_token else None
                views.append(_LayerView(self, index, table, None))
        return list[LayerState](views)

    @property
    def plain(self) -> bool:
        """Whether the step is one view of the store, whatever the layers remember: one length,
        adjacent slots, no padding, and new rows that lie side by side in every table.
        """
        lined_up = self.uniform and self.full and self.adjacent
        return lined_up and all(table.row is not None for table in self.tables.values())

    @property
    def rotary(self) -> list[tuple[int, float]]:
        """The (dim, theta) of the rotary tables that layers have asked for in this step."""
        return list(self._rope)

    def rope(self, dim: int, theta: float) -> Tensor:
        """Rotary angles of the new tokens, complex64 [1 or B, K, 1, dim/2]."""
        angles = self._rope.get((dim, theta))
        if angles is None:
            end = max(self.lengths) + self.new_tokens
            table = rope_table(end, dim, theta, self.device)
            if self.uniform:
                angles = table[self.start : self.start + self.new_tokens].unsqueeze(0)
            else:
                angles = table[self.positions]
            self._rope[dim, theta] = angles
        return angles


class _LayerView:
    """One layer's `LayerState`."""

    def __init__(
        self,
        step: StepView,
        index: int,
        table: TableStep | None,
        owner: "_LayerView | None",
    ) -> None:
        self.step = step
        self.index = index
        self.table = table
        self.owner = owner
        self.new = step.new
        self.valid = step.valid
        self.each = step.each
        self._seen: dict[str, Seen] = {}
        self._given: dict[str, Tensor] = {}

    @property
    def positions(self) -> Tensor:
        return self.step.positions

    def rope(self, dim: int, theta: float) -> Tensor:
        return self.step.rope(dim, theta)

    def append(self, name: str, rows: Tensor) -> Seen:
        if self.table is None:
            raise ValueError(f"layer {self.index} declares no per-token tensor '{name}' of its own")
        pool = self.step.store.pools[self.index][name]
        batch = len(self.step.slots), self.step.new_tokens
        require_fit(self.index, name, rows, (*batch, *rows_shape(pool)), pool)
        self.step.wrote_rows = True
        home = None
        if self.table.identity:
            home = self.step.store.home(self.index, name, self.step.slots[0], len(rows))
        seen = self.table.append(pool, home, rows)
        self._seen[name] = seen
        return seen

    def seen(self, name: str) -> Seen:
        return (self.owner or self)._seen[name]

    def get(self, name: str) -> Tensor:
        # What is returned may be written into.
        self.step.wrote_fixed = True
        pool = self.step.store.slots[self.index][name]
        slots = self.step.slots
        if self.step.adjacent:
            value = pool.narrow(0, slots[0], len(slots))
        else:
            value = pool[torch.tensor(slots, device=pool.device)]
        self._given[name] = value
        return value

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        store, slots = self.step.store, self.step.slots
        pool = store.slots[self.index][name]
        require_fit(self.index, name, value, (len(slots), *pool.shape[1:]), pool)
        if each is not None:
            shape = len(slots), self.step.new_tokens, *pool.shape[1:]
            require_fit(self.index, name, each, shape, pool)
        self.step.wrote_fixed = True
        at = torch.tensor(slots, device=pool.device) if not self.step.adjacent else None
        if at is not None:
            pool.index_copy_(0, at, value)
        elif value is not self._given.get(name):
            pool.narrow(0, slots[0], len(slots)).copy_(value)
        if store.lookback:
            self._remember(name, pool, each)

    def _remember(self, name: str, pool: Tensor, each: Tensor | None) -> None:
        """Keep the value at every length that a rollback may return to."""
        store, step = self.step.store, self.step
        ring = store.history[self.index][name]
        size = store.lookback + 1
        for b, (slot, length, count) in enumerate(
            zip(step.slots, step.lengths, step.counts, strict=True)
        ):
            if step.each:
                if each is None:
                    raise ValueError(f"'{name}' needs its value after each token (state.each)")
                for t in range(count):
                    ring[slot, (length + t + 1) % size] = each[b, t]
            else:
                ring[slot, (length + count) % size] = pool[slot]
