"""One store for the state of all architectures, always paged.

Per-token tensors live in pages behind block tables, one table per distinct window; fixed tensors
live in slots. Pages are reference-counted, so a fork shares its prefix and copies on write; a
recurrent state is forked by copying its slot. With `lookback` > 0 the newest tokens can be
rolled back: windows keep that many rows more, and fixed tensors a ring of snapshots by length.

Rows of one plane (a head of K, say) lie together: a pool is [*planes, pages * page_size, row].
The loop owns lengths: `begin` opens a step, `commit` advances it. A step is all or nothing: where
it fails, `abort` undoes it, and a sequence whose state was overwritten by then is lost, which every
later use of it says.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush

import torch
from torch import Tensor

from archs.errors import UserError
from archs.spec import StateSpec, TensorSpec
from infer.memory import require_memory
from infer.pages import PageTable, StoreFullError
from infer.synthetic import synthesise
from infer.undo import undo
from infer.view import StepView

TableKey = tuple[int | None, int]


class StateStore:
    """State of up to `max_sequences` sequences of up to `max_context` tokens.

    specs:    one StateSpec per layer.
    pages:    pages per table; default: enough for all sequences at full length.
    lookback: tokens that `rollback` can take back from windowed and fixed state.
    Raises UserError when the pools cannot fit in the memory that is free.
    """

    def __init__(
        self,
        specs: Sequence[StateSpec],
        *,
        max_sequences: int,
        max_context: int,
        page_size: int = 64,
        lookback: int = 0,
        pages: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if max_sequences < 1 or max_context < 1 or page_size < 1 or lookback < 0:
            raise UserError(
                f"max_sequences={max_sequences}, max_context={max_context}, "
                f"page_size={page_size} must be at least 1 and lookback={lookback} at least 0"
            )
        self.specs = list(specs)
        self.max_context = max_context
        self.page_size = page_size
        self.lookback = lookback
        self.device = torch.device(device)
        self.lengths = [0] * max_sequences
        self.oldest = [0] * max_sequences
        #: A heap: the lowest slot is opened first, so that batches are adjacent slots.
        self._free_slots = list(range(max_sequences))
        self._open = [False] * max_sequences
        #: Sequences whose state a failed step has overwritten.
        self._lost: set[int] = set()
        self._step: StepView | None = None
        wanted = self.declared_bytes(max_context) * max_sequences
        if pages is not None:
            wanted = min(wanted, pages * page_size * sum(s.token_bytes for s in self.specs))
        require_memory(
            wanted, self.device, f"the state of {max_sequences} sequences of {max_context} tokens"
        )
        self.tables: dict[TableKey, PageTable] = {}
        for spec in self.specs:
            if spec.per_token and spec.owner is None and self._key(spec) not in self.tables:
                self.tables[self._key(spec)] = PageTable(
                    slots=max_sequences, max_context=max_context, page_size=page_size,
                    window=spec.window, sinks=spec.sinks, lookback=lookback, pages=pages,
                )  # fmt: skip
        # Zeros, not empty: rows that a mask hides are still multiplied by a zero weight.
        self.pools: list[dict[str, Tensor]] = [self._pools(spec) for spec in self.specs]
        self.slots: list[dict[str, Tensor]] = [self._fixed(s, max_sequences) for s in self.specs]
        self.history: list[dict[str, Tensor]] = [
            {n: t.new_zeros(t.shape[0], lookback + 1, *t.shape[1:]) for n, t in fixed.items()}
            if lookback
            else {}
            for fixed in self.slots
        ]
        self._homes: dict[tuple[int, str, int, int], Tensor] = {}
        # Counted from the tensors, and once: they stay, and a step adds up its bytes.
        self._page_bytes = {key: self._bytes_of_a_page(key) for key in self.tables}
        self._fixed_bytes = sum(
            t[0].nbytes for tensors in (*self.slots, *self.history) for t in tensors.values()
        )
        self.peak_bytes = 0

    # -- sequences ---------------------------------------------------------------------------

    @contextmanager
    def sequences(self, count: int) -> Iterator[list[int]]:
        """Open `count` empty sequences, all or none; what is left in the list closes at the end.

        Whoever releases one earlier takes it out of the list. Raises StoreFullError.
        """
        if count > len(self._free_slots):
            raise StoreFullError(
                f"{count} sequences do not fit in the {len(self._free_slots)} free slots of "
                f"{len(self.lengths)}; release some, or open a store with a larger max_sequences"
            )
        slots: list[int] = []
        try:
            for _ in range(count):
                slots.append(self.add())
            yield slots
        finally:
            for slot in slots:
                self.release(slot)

    def add(self) -> int:
        """Open an empty sequence and return its slot. Raises StoreFullError."""
        if not self._free_slots:
            raise StoreFullError(f"all {len(self.lengths)} sequence slots are in use; release one")
        slot = self._free_slots[0]
        for fixed in (*self.slots, *self.history):
            for tensor in fixed.values():
                tensor[slot].zero_()
        self.lengths[slot] = self.oldest[slot] = 0
        heappop(self._free_slots)
        self._open[slot] = True
        self._note_peak()
        return slot

    def release(self, slot: int) -> None:
        """Close a sequence, a lost one too; its pages go back unless a fork still holds them."""
        self._require_open(slot, lost=True)
        for table in self.tables.values():
            table.release(slot)
        self._lost.discard(slot)
        self._open[slot] = False
        heappush(self._free_slots, slot)

    def fork(self, slot: int) -> int:
        """A second sequence with the same past: pages shared, fixed state copied."""
        self._require_open(slot)
        child = self.add()
        for table in self.tables.values():
            table.fork(slot, child)
        for fixed in (*self.slots, *self.history):
            for tensor in fixed.values():
                tensor[child].copy_(tensor[slot])
        self.lengths[child], self.oldest[child] = self.lengths[slot], self.oldest[slot]
        self._note_peak()
        return child

    def rollback(self, slot: int, tokens: int) -> None:
        """Forget the newest `tokens` tokens of a sequence, as if they had never been.

        Raises UserError where the state no longer reaches back that far.
        """
        self._require_open(slot)
        length = self.lengths[slot] - tokens
        bounded = any(s.fixed or s.window is not None for s in self.specs)
        oldest = self.oldest[slot] if bounded else 0
        if tokens < 0 or length < oldest:
            raise UserError(
                f"rollback of {tokens} tokens at length {self.lengths[slot]} reaches before "
                f"{oldest}; open the store with a larger lookback (now {self.lookback})"
            )
        if tokens == 0:
            return
        for table in self.tables.values():
            table.truncate(slot, length, self.lengths[slot])
        for fixed, history in zip(self.slots, self.history, strict=True):
            for name, ring in history.items():
                fixed[name][slot].copy_(ring[slot, length % (self.lookback + 1)])
        self.lengths[slot] = length

    # -- steps -------------------------------------------------------------------------------

    @contextmanager
    def step(
        self, slots: Sequence[int], new_tokens: int, new: Tensor | None = None
    ) -> Iterator[StepView]:
        """A step from `begin` that ends in `commit`, or in `abort` where anything fails."""
        self._require_idle()
        try:
            step = self.begin(slots, new_tokens, new)
            yield step
            self.commit(step)
        except BaseException:
            self.abort()
            raise

    def begin(self, slots: Sequence[int], new_tokens: int, new: Tensor | None = None) -> StepView:
        """Open a step of `new_tokens` tokens per sequence (`new` [B] of them valid).

        Raises UserError beyond max_context, for a sequence named twice and while another step is
        open, and StoreFullError without pages; the store then is as it was.
        """
        self._require_idle()
        counts = [new_tokens] * len(slots) if new is None else [int(n) for n in new.tolist()]
        if not slots or new_tokens < 1 or len(counts) != len(slots):
            raise UserError(
                f"a step of {new_tokens} tokens for sequences {list(slots)} and new={counts} needs "
                "at least one of each, and one count per sequence"
            )
        for count in counts:
            if not 0 <= count <= new_tokens:
                raise UserError(f"new={count} must lie between 0 and {new_tokens}")
        self.check_context(slots, counts)
        self._step = StepView(self, list(slots), new_tokens, counts)
        try:
            self._step.reserve()
        except BaseException:
            self.abort()
            raise
        self._note_peak()
        return self._step

    def check_context(self, slots: Sequence[int], counts: Sequence[int]) -> None:
        """Raise UserError unless distinct open sequences can all take `counts` more tokens."""
        for slot, count in zip(slots, counts, strict=True):
            self._require_open(slot)
            if self.lengths[slot] + count > self.max_context:
                raise UserError(
                    f"context {self.lengths[slot] + count} exceeds max_context="
                    f"{self.max_context}; open the store with a larger max_context"
                )
        if len(set(slots)) != len(slots):
            raise UserError(
                f"sequences {list(slots)} name one twice in a step; name each once, or fork it"
            )

    def commit(self, step: StepView) -> None:
        """Advance the lengths of a step's sequences, free what left a window, close the step.

        Raises UserError for a step that is not open.
        """
        if step is not self._step:
            raise UserError("this step is not the open one; commit a step once, after its `begin`")
        step.committed = True
        for slot, length, count in zip(step.slots, step.lengths, step.counts, strict=True):
            self.lengths[slot] = length + count
            for table in self.tables.values():
                table.settle(slot, self.lengths[slot])
            oldest = self.lengths[slot] - self.lookback
            if count and not step.each:
                oldest = self.lengths[slot]
            self.oldest[slot] = max(self.oldest[slot], oldest)
        self._step = None
        step.close()

    def abort(self) -> None:
        """Undo the open step, if there is one: lengths, pages and fixed tensors are as before it.

        Where the step has overwritten state of which there is no copy (recurrent state without
        lookback; a window's rows in a step longer than its ring), the sequence is lost.
        """
        step = self._step
        if step is None:
            return
        if step.committed:
            # Interrupted in `commit`: every layer has run, so the step is finished instead.
            self.commit(step)
            return
        self._lost |= undo(step)
        self._step = None
        step.close()

    def fill(self, slots: Sequence[int], length: int) -> None:
        """Give sequences `length` more tokens of synthetic state, for timing steps at that context.

        Touches no other sequence; no part of it can be rolled back. Raises as `begin`.
        """
        if length:
            with self.step(slots, length) as step:
                synthesise(step)
            for slot in slots:
                self.oldest[slot] = self.lengths[slot]

    def snapshot(self, slot: int) -> list[dict[str, Tensor]]:
        """What each layer remembers of a sequence: copies of its visible rows and fixed tensors.

        Per-token tensors come as [*planes, rows, row], oldest first, sinks apart.
        """
        self._require_open(slot)
        length = self.lengths[slot]
        layers = []
        for spec, pools, fixed in zip(self.specs, self.pools, self.slots, strict=True):
            held = {name: tensor[slot].clone() for name, tensor in fixed.items()}
            for name, pool in pools.items():
                table, first = self.table_of(spec), 0
                if spec.window is not None:
                    first = max(length - spec.window, table.oldest_row(slot))
                rows = table.rows(slot, torch.arange(first, length))
                held[name] = pool[..., rows.to(pool.device), :]
            layers.append(held)
        return layers

    # -- accounting --------------------------------------------------------------------------

    def declared_bytes(self, length: int) -> int:
        """What the specs declare for one sequence of `length` tokens, in whole pages."""
        return sum(
            s.state_bytes(length, page_size=self.page_size, lookback=self.lookback)
            for s in self.specs
        )

    @property
    def allocated_bytes(self) -> int:
        """Bytes of pages in use and of the fixed state of open sequences."""
        paged = sum(table.used * self._page_bytes[key] for key, table in self.tables.items())
        return paged + (len(self.lengths) - len(self._free_slots)) * self._fixed_bytes

    def _bytes_of_a_page(self, key: TableKey) -> int:
        """Bytes of one page of a table in the pools of all its layers."""
        layers = zip(self.specs, self.pools, strict=True)
        pools = [p for s, named in layers if self._key(s) == key for p in named.values()]
        return sum(pool.nbytes for pool in pools) // self.tables[key].n_pages

    # -- inside ------------------------------------------------------------------------------

    @staticmethod
    def _key(spec: StateSpec) -> TableKey:
        return spec.window, spec.sinks

    def table_of(self, spec: StateSpec) -> PageTable:
        """The block tables behind a layer's per-token rows."""
        return self.tables[self._key(spec)]

    def home(self, layer: int, name: str, first: int, count: int) -> Tensor:
        """The home rows of `count` slots from `first` on, [count, *planes, rows_per_slot, row].

        A view of the pool, made once: a small decode step is bound by the calls it makes.
        """
        key = layer, name, first, count
        found = self._homes.get(key)
        if found is None:
            rows = self.table_of(self.specs[layer]).rows_per_slot
            slots = self.pools[layer][name].unflatten(-2, (-1, rows)).narrow(-3, first, count)
            self._homes[key] = found = slots.movedim(-3, 0)
        return found

    def _pools(self, spec: StateSpec) -> dict[str, Tensor]:
        if spec.owner is not None or not spec.per_token:
            return {}
        rows = self.table_of(spec).n_pages * self.page_size
        return {t.name: self._zeros(t, (*t.shape[:-1], rows, t.shape[-1])) for t in spec.per_token}

    def _fixed(self, spec: StateSpec, slots: int) -> dict[str, Tensor]:
        return {t.name: self._zeros(t, (slots, *t.shape)) for t in spec.fixed}

    def _zeros(self, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape, dtype=spec.dtype, device=self.device)

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def _require_open(self, slot: int, *, lost: bool = False) -> None:
        """Raise unless a sequence is open and in no open step; lost: one that was lost will do."""
        if not 0 <= slot < len(self.lengths) or not self._open[slot]:
            raise UserError(f"sequence {slot} is not open; `add` or `fork` one first")
        if self._step is not None and slot in self._step.slots:
            self._require_idle()
        if slot in self._lost and not lost:
            raise UserError(
                f"sequence {slot} was lost in a step that failed; release it and start it anew"
            )

    def _require_idle(self) -> None:
        if self._step is not None:
            raise UserError(
                f"a step of sequences {self._step.slots} is open; commit or abort it first"
            )
