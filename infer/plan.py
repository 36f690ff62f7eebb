"""One plan per step: which tokens of which sequences, where their rows and values go, what is
copied first.

The host's books become a plan in `StateStore.begin`; torch forms and kernels both read it. A plan
has K >= 1 tokens for each sequence, of which some may be padding: decode, verification of drafts
and chunks of prompts are plans of different shapes and may stand in one batch.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from archs.spec import kept_states
from infer.books import Books, OnDevice, Padding, Rotary, book, staged
from infer.pages import PageTable, TableKey
from infer.pools import LayerTensors, Pools
from infer.rings import RingChange, RingTable
from infer.rows import Held, InPages, RowForm, RowStep
from infer.slots import SlotChange, SlotTable
from infer.state import LayerState, RowTensor, StepContext
from infer.values import Fixed, InPlace, Replays, Slotted, ValueForm
from kernels.rope.torch import rope_table


class Store(Protocol):
    """What a step needs of the store; `infer.store` says what each is."""

    device: torch.device
    kernels: bool
    max_context: int
    lookback: int
    lengths: list[int]
    tables: dict[TableKey, PageTable]
    slots: SlotTable | None
    rings: RingTable | None
    pools: Pools
    on_device: OnDevice


class StepPlan:
    """An open step of K new tokens for some sequences.

    lengths, counts: tokens of each sequence before the step, and its valid new ones.
    wrote_rows, wrote_fixed: whether rows, and values, may have been written: what cannot be undone.
    """

    def __init__(
        self, store: Store, sequences: list[int], new_tokens: int, counts: list[int]
    ) -> None:
        self.store = store
        self.sequences = sequences
        self.new_tokens = new_tokens
        self.counts = counts
        self.device = store.device
        self.kernels = store.kernels
        self.lengths = [store.lengths[s] for s in sequences]
        self.start = self.lengths[0]
        self.uniform = self.lengths.count(self.start) == len(sequences)
        self.full = counts.count(new_tokens) == len(counts)
        first = sequences[0]
        self.adjacent = sequences == list(range(first, first + len(sequences)))
        self.each = keeps_each(store.lookback, new_tokens)
        self.wrote_rows = self.wrote_fixed = False
        self.committed = False
        self.tables = {key: RowStep(self, table) for key, table in store.tables.items()}
        self.slots = SlotChange()
        self.rings: RingChange | None = None
        self.batch = len(sequences)
        self._rope: dict[Rotary, Tensor] = {}

    def reserve(self) -> None:
        """Make rows and values writable. Raises StoreFullError, with part of the work done."""
        for step in self.tables.values():
            step.reserve()
        slots, change, new = self.store.slots, self.slots, self.new_tokens
        if self.store.rings is not None:
            self.rings = self.store.rings.reserve(self.sequences, self.lengths, self.counts, new)
        if slots is not None:
            for sequence, length, count in zip(
                self.sequences, self.lengths, self.counts, strict=True
            ):
                slots.reserve(sequence, length, count, new, change)

    @property
    def bound(self) -> int:
        """Most tokens that a sequence has after the step, padding included."""
        return max(self.lengths) + self.new_tokens

    @property
    def at_home(self) -> bool:
        """Whether the batch's rows are views of the pools, which new rows are written to."""
        return all(step.at_home and not step.joins for step in self.tables.values())

    def start_copies(self, *, joined: bool = False) -> None:
        """Copy what is shared and will be written to; joined: in tables that join rows, too.

        Those wait until the past has been gathered: a page that a step frees may be the target of
        a copy and hold somebody's past.
        """
        due = {
            key: step for key, step in self.tables.items()
            if step.change.copies and (joined or not step.joins)
        }  # fmt: skip
        rings = [] if self.rings is None else self.rings.copies
        moved, ringed = (staged(c, self.device) if c else None for c in (self.slots.copies, rings))
        self.wrote_rows |= bool(due)
        # With lookback a copy may stand where an older value of its sequence did.
        self.wrote_fixed |= moved is not None and self.store.lookback > 0
        for layer in self.store.pools.layers:
            for key, pool in layer.row_pools:
                if key in due:
                    due[key].copy_shared(pool)
            for name, value in layer.fixed.items():
                _copy(value, ringed if name in layer.inputs else moved)
            for inputs in layer.inputs.values():
                _copy(inputs, ringed)

    def _sent(self, padded: int) -> Tensor:
        """The books on the device, of a batch padded to so many sequences.

        A small copy from pageable memory: the driver stages it and does not wait for the device.
        """
        slots, rings = self.store.slots, self.store.rings
        padding = Padding(
            len(self.store.lengths), 0 if slots is None else slots.padding,
            0 if rings is None else rings.padding,
        )  # fmt: skip
        sent = book(
            self.sequences, self.lengths, self.counts, self.new_tokens,
            None if slots is None else self.slots, self.rings, padded=padded, padding=padding,
        )  # fmt: skip
        return sent.to(self.device, non_blocking=True)

    @cached_property
    def books(self) -> Books:
        """The step as tensors on the device."""
        return Books(
            self.store.on_device, self._sent(self.batch), self.batch, self.new_tokens,
            ragged=not self.full,
        )  # fmt: skip

    def send(self, padded: int) -> Tensor:
        """Bring the device up to date for kernels, which write where they please.

        Returns the books, of a batch that is padded to so many sequences.
        """
        self.prepare()
        return self._sent(padded)

    def prepare(self) -> None:
        """What must have happened before kernels run."""
        self.wrote_rows = self.wrote_fixed = True
        self.start_copies()
        self.store.on_device.update()

    # -- what all layers share (torch forms) ---------------------------------------------------

    @property
    def new(self) -> Tensor | None:
        """As `archs.state.LayerState.new`."""
        return None if self.full else self.books.new

    @property
    def valid(self) -> Tensor | None:
        """As `archs.state.LayerState.valid`."""
        return None if self.full else self.books.valid

    @property
    def past(self) -> Tensor:
        """As `archs.state.LayerState.past`."""
        return self.books.past

    @cached_property
    def positions(self) -> Tensor:
        """As `archs.state.LayerState.positions`."""
        if not self.uniform:
            return self.books.positions
        return torch.arange(self.start, self.start + self.new_tokens, device=self.device)[None]

    def rope(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `archs.state.LayerState.rope`."""
        angles = self._rope.get((dim, theta, turned))
        if angles is None:
            table = rope_table(self.bound, dim, theta, self.device, turned)
            if self.uniform:
                angles = table[self.start : self.bound].unsqueeze(0)
            else:
                angles = table[self.positions]
            self._rope[dim, theta, turned] = angles
        return angles

    @property
    def asked(self) -> list[Rotary]:
        """The rotary angles of new tokens that layers have asked for in this step."""
        return list(self._rope)

    def rotary(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `archs.state.LayerState.rotary`."""
        return self.store.on_device.rotary(dim, theta, turned)

    # -- layers --------------------------------------------------------------------------------

    @cached_property
    def values(self) -> ValueForm | None:
        """How values are got and put; None where no layer has any."""
        slots = self.store.slots
        if slots is None:
            return None
        read, count = self.slots.read, len(self.sequences)
        adjacent = read == list(range(read[0], read[0] + count)) and read == self.slots.last
        if adjacent and not self.each and not self.kernels:
            return InPlace(read[0], count)
        return slotted(slots, self.books, self.each)

    @cached_property
    def replays(self) -> Replays | None:
        """How values are replayed; None where none is."""
        table, change = self.store.rings, self.rings
        if table is None or change is None:
            return None
        slot, count = change.slot, len(self.sequences)
        form: ValueForm | None = None
        if slot == list(range(slot[0], slot[0] + count)) and not self.kernels:
            form = InPlace(slot[0], count)
        return Replays(
            self.books, form, most=max(change.held), same=len(set(change.held)) == 1,
            folds=any(change.fold), whole=change.whole, padding=table.padding,
        )  # fmt: skip

    @cached_property
    def layers(self) -> list[LayerState]:
        """One state per layer, to hand to `Mixer.extend`."""
        if self.kernels:
            self.prepare()
            step = DeviceStep(self.store, self.books, self.bound, self.each)
            forms: dict[TableKey, RowForm] = {key: s.form() for key, s in self.tables.items()}
            return layers_of(self.store, step, forms, self.values, self.replays)
        self.start_copies()
        forms = {key: s.form() for key, s in self.tables.items()}
        homes = self.sequences[0] if self.adjacent else None
        return layers_of(self.store, self, forms, self.values, self.replays, homes)

    def close(self) -> None:
        """Part with all that points back here: what a finished step held is free at once, not
        when the garbage collector finds the circle.
        """
        self.__dict__.pop("layers", None)
        self.tables.clear()


class DeviceStep:
    """What all layers share in a step whose books are on the device; kernels read nothing else.

    bound: most tokens that a sequence has after the step.
    """

    def __init__(self, store: Store, books: Books, bound: int, each: bool) -> None:
        self.store = store
        self.books = books
        self.bound = bound
        self.each = each
        self.batch, self.new_tokens = books.write.shape
        self.new = books.new
        self.past = books.past
        self.wrote_rows = self.wrote_fixed = True

    @property
    def valid(self) -> Tensor | None:
        """As `archs.state.LayerState.valid`."""
        return self.books.valid

    @property
    def positions(self) -> Tensor:
        """As `archs.state.LayerState.positions`."""
        return self.books.positions

    def rope(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `archs.state.LayerState.rope`."""
        end = max(self.store.max_context, self.bound)
        return rope_table(end, dim, theta, self.store.device, turned)[self.positions]

    def rotary(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `archs.state.LayerState.rotary`."""
        return self.store.on_device.rotary(dim, theta, turned)

    @property
    def layers(self) -> list[LayerState]:
        """One state per layer, for a step that joins no rows."""
        store = self.store
        forms: dict[TableKey, RowForm] = {
            key: InPages(self.books.rows(key), table.rows(self.bound), True)
            for key, table in store.tables.items()
        }
        values = None if store.slots is None else slotted(store.slots, self.books, self.each)
        replays = None if store.rings is None else any_replays(store.rings, self.books)
        return layers_of(store, self, forms, values, replays)


def slotted(slots: SlotTable, books: Books, each: bool) -> Slotted:
    """Values of a step in their slots; without lookback every step updates them in place."""
    return Slotted(books, each=each, in_place=slots.lookback == 0, padding=slots.padding)


def any_replays(table: RingTable, books: Books) -> Replays:
    """Of a step whose books alone say what is held: one that finds room for its inputs."""
    return Replays(
        books, None, most=table.replay.rows - books.new_tokens, same=False, folds=True,
        whole=False, padding=table.padding,
    )  # fmt: skip


def _copy(pool: Tensor, moved: Tensor | None) -> None:
    """Copy slots of a pool [slots, …]; moved: int64 [N, 2], from and to."""
    if moved is not None:
        pool.index_copy_(0, moved[:, 1], pool.index_select(0, moved[:, 0]))


def layers_of(
    store: Store, step: StepContext, forms: Mapping[TableKey, RowForm], values: ValueForm | None,
    replays: Replays | None, first: int | None = None,
) -> list[LayerState]:  # fmt: skip
    """One state per layer.

    first: of adjacent sequences, whose home rows forms may ask for.
    """
    states: list[LayerState] = []
    for index, layer in enumerate(store.pools.layers):
        rows: dict[str, RowTensor] = {}
        for name, (key, pool, _) in layer.rows.items():
            home = None
            if first is not None and store.tables[key].has_homes:
                home = store.pools.home(index, name, first, step.batch)
            held = Held(pool, home, layer.scales.get(name))
            rows[name] = row_tensor(layer, name, held, forms[key], step.new_tokens)
        owners = {name: states[owner] for name, owner in layer.lent.items()}
        fixed = Fixed(
            layer.fixed, layer.inputs, values or NONE, replays, layer.codings, layer.keeps
        )
        states.append(LayerState(step, index, rows, fixed, owners))
    return states


def row_tensor(
    layer: LayerTensors, name: str, held: Held, form: RowForm, new_tokens: int
) -> RowTensor:
    """A row tensor of a layer in a step of so many tokens."""
    key, _, shape = layer.rows[name]
    coding, block = layer.codings.get(name), layer.blocks.get(name)
    if block is not None:
        # Tokens are given one by one, and stored in blocks.
        given = layer.fixed[block].shape[2:]
        return RowTensor(held, form, (new_tokens, *given), coding, block)
    new = new_tokens if key.every == 1 else -(-new_tokens // key.every)
    return RowTensor(held, form, (new, *shape), coding, every=key.every)


#: Of a store without fixed tensors.
NONE = InPlace(0, 0)


def keeps_each(lookback: int, new_tokens: int) -> bool:
    """Whether a step keeps values after tokens before its last, so that it can be rolled back."""
    return lookback > 0 and kept_states(new_tokens, lookback) > 1
