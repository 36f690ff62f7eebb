"""One layer's state in one step: the only `LayerState` there is, whatever runs the layers.

What a layer gives is what it declared: a store casts nothing and broadcasts nothing. What differs
between a plain batch, any other, kernels and compiled code are the forms that its tensors come in:
`RowForm` stores and sees rows, `ValueForm` gets and puts values.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from archs.errors import UserError
from archs.state import PagedSeen, Pages, Replayed, Rows, Slots
from infer.books import Books
from infer.rows import Held, InPages, Joined, RowForm


class StepContext(Protocol):
    """What all layers share in a step.

    batch, new_tokens: B and K; new, valid, each: as `archs.state.LayerState`'s.
    wrote_rows, wrote_fixed: set where rows, and values, may have been written to.
    """

    batch: int
    new_tokens: int
    each: bool
    wrote_rows: bool
    wrote_fixed: bool

    @property
    def new(self) -> Tensor | None: ...
    @property
    def valid(self) -> Tensor | None: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def past(self) -> Tensor: ...
    def rope(self, dim: int, theta: float) -> Tensor: ...
    def rotary(self, dim: int, theta: float) -> Tensor: ...


class ValueForm(Protocol):
    """One way to get and put the value of a fixed tensor from and into its pool [slots, *shape]."""

    def get(self, pool: Tensor) -> Tensor:
        """The values before the step [B, *shape]; may be written into."""
        ...

    def put(self, pool: Tensor, value: Tensor, each: Tensor | None) -> None:
        """Keep the values after it, and `each` [B, K, *shape] after its tokens."""
        ...


class InPlace(NamedTuple):
    """Adjacent slots that are updated in place."""

    first: int
    batch: int

    def get(self, pool: Tensor) -> Tensor:
        """As `ValueForm.get`; a view."""
        return pool.narrow(0, self.first, self.batch)

    def put(self, pool: Tensor, value: Tensor, each: Tensor | None) -> None:
        """As `ValueForm.put`."""
        held = self.get(pool)
        if value.data_ptr() != held.data_ptr():
            held.copy_(value)


class Indexed(NamedTuple):
    """Values in any slots, read from one and written to others.

    read, last: int64 [B]; write: int64 [B * K]. See `archs.state.Slots`.
    """

    read: Tensor
    write: Tensor
    last: Tensor

    def get(self, pool: Tensor) -> Tensor:
        """As `ValueForm.get`; a copy."""
        return pool.index_select(0, self.read)

    def put(self, pool: Tensor, value: Tensor, each: Tensor | None) -> None:
        """As `ValueForm.put`."""
        if each is not None:
            pool.index_copy_(0, self.write, each.flatten(0, 1))
        pool.index_copy_(0, self.last, value)


class Slotted:
    """As `Indexed`, from a step's books, which kernels read themselves.

    in_place: as `archs.state.Slots`'. padding: the slot that takes what is not kept.
    """

    def __init__(self, books: Books, *, each: bool, in_place: bool, padding: int) -> None:
        self._books = books
        self._each = each
        self._in_place = in_place
        self._padding = padding

    @cached_property
    def indexed(self) -> Indexed:
        """The books as indices."""
        books = self._books
        return Indexed(books.read_at, books.write_at(self._padding), books.last_at)

    def get(self, pool: Tensor) -> Tensor:
        """As `ValueForm.get`; a copy."""
        return self.indexed.get(pool)

    def put(self, pool: Tensor, value: Tensor, each: Tensor | None) -> None:
        """As `ValueForm.put`."""
        self.indexed.put(pool, value, each)

    def slots(self, pool: Tensor) -> Slots:
        """The pool as kernels see it."""
        books = self._books
        return Slots(
            pool=pool, read=books.read, write=books.write, last=books.last, each=self._each,
            in_place=self._in_place,
            new=books.count if books.ragged else None, arrivals=books.shared.arrivals,
        )  # fmt: skip


class Replays:
    """How the values of a step are replayed; all but the pools of `archs.state.Replayed`.

    form: how the one value of a sequence is got and put (None: by the books).
    """

    def __init__(
        self, books: Books, form: ValueForm | None, *, most: int, same: bool, folds: bool,
        whole: bool, padding: int,
    ) -> None:  # fmt: skip
        self._books = books
        self._form = form
        self._made = partial(
            Replayed, most=most, same=same, folds=folds, whole=whole, padding=padding
        )

    @cached_property
    def values(self) -> ValueForm:
        """The values that are kept."""
        if self._form is not None:
            return self._form
        at = self._books.ring.long()
        return Indexed(at, at, at)

    def of(self, values: Tensor, inputs: Tensor) -> Replayed:
        """A tensor's pools as the mixer sees them."""
        books = self._books
        return self._made(
            values=values, inputs=inputs, slot=books.ring, past=books.past, held=books.held,
            fold=books.fold, new=books.count if books.ragged else None,
            arrivals=books.shared.arrivals,
        )  # fmt: skip

    def slots(self, pool: Tensor) -> Slots:
        """The values as a step kernel updates them in place, once nothing is held."""
        books = self._books
        write = books.ring[:, None].expand(books.write.shape).contiguous()
        return Slots(
            pool=pool, read=books.ring, write=write, last=books.ring, each=False, in_place=True,
            new=books.count if books.ragged else None, arrivals=books.shared.arrivals,
        )  # fmt: skip


class Fixed(NamedTuple):
    """The fixed tensors of a layer in a step.

    pools, inputs: as `infer.pools.LayerTensors.fixed` and `inputs`. values: of those that are kept
    in copies; replays: of the others.
    """

    pools: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    values: ValueForm
    replays: Replays | None

    def form(self, name: str) -> ValueForm:
        """How a tensor is got and put."""
        if name in self.inputs:
            assert self.replays is not None
            return self.replays.values
        return self.values

    def replayed(self, name: str) -> Replayed | None:
        """As `archs.state.LayerState.replayed`."""
        inputs = self.inputs.get(name)
        if inputs is None or self.replays is None:
            return None
        return self.replays.of(self.pools[name], inputs)


class RowTensor(NamedTuple):
    """A row tensor of a layer in a step.

    shape: of the new rows of one sequence, padding included: [R, *shape].
    """

    held: Held
    form: RowForm
    shape: tuple[int, ...]


class LayerState:
    """As `archs.state.LayerState`."""

    def __init__(
        self, step: StepContext, index: int, rows: Mapping[str, RowTensor], fixed: Fixed,
        owners: Mapping[str, "LayerState"],
    ) -> None:  # fmt: skip
        self._step = step
        self._index = index
        self._rows = rows
        self._fixed = fixed
        self._owners = owners
        self._seen: dict[str, Rows] = {}
        self.each = step.each

    @property
    def new(self) -> Tensor | None:
        """As `archs.state.LayerState.new`."""
        return self._step.new

    @property
    def valid(self) -> Tensor | None:
        """As `archs.state.LayerState.valid`."""
        return self._step.valid

    @property
    def positions(self) -> Tensor:
        """As `archs.state.LayerState.positions`."""
        return self._step.positions

    @property
    def past(self) -> Tensor:
        """As `archs.state.LayerState.past`."""
        return self._step.past

    def rope(self, dim: int, theta: float) -> Tensor:
        """As `archs.state.LayerState.rope`."""
        return self._step.rope(dim, theta)

    def rotary(self, dim: int, theta: float) -> Tensor:
        """As `archs.state.LayerState.rotary`."""
        return self._step.rotary(dim, theta)

    # -- rows ------------------------------------------------------------------------------------

    @property
    def gathered(self) -> bool:
        """Whether rows of pages were gathered instead of being left to a kernel."""
        return any(isinstance(s, PagedSeen) and s.gathered for s in self._seen.values())

    def append(self, name: str, rows: Tensor) -> Rows:
        """As `archs.state.LayerState.append`."""
        held, form, shape = self._row(name)
        _require_fit(self._index, name, rows, (self._step.batch, *shape), held.pool)
        self._step.wrote_rows = True
        self._seen[name] = seen = form.append(held, rows)
        return seen

    def seen(self, name: str) -> Rows:
        """As `archs.state.LayerState.seen`."""
        return self._owners.get(name, self)._seen[name]

    def pages(self, name: str, dtype: torch.dtype) -> Pages | None:
        """As `archs.state.LayerState.pages`."""
        held, form, _ = self._row(name)
        _require_dtype(self._index, name, dtype, held.pool)
        if isinstance(form, InPages):
            return form.books.pages(held.pool)
        if isinstance(form, Joined):
            return None
        raise ValueError(_NO_KERNELS)

    def written(self, name: str) -> Rows:
        """As `archs.state.LayerState.written`."""
        held, form, _ = self._row(name)
        if not isinstance(form, InPages):
            raise ValueError(_NO_KERNELS)
        self._seen[name] = seen = form.see(held)
        return seen

    def _row(self, name: str) -> RowTensor:
        found = self._rows.get(name)
        if found is None:
            raise ValueError(f"layer {self._index} declares no row tensor '{name}' of its own")
        return found

    # -- values ----------------------------------------------------------------------------------

    def get(self, name: str) -> Tensor:
        """As `archs.state.LayerState.get`."""
        # What is returned may be written into.
        self._step.wrote_fixed = True
        return self._fixed.form(name).get(self._fixed.pools[name])

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        """As `archs.state.LayerState.put`."""
        step, pool = self._step, self._fixed.pools[name]
        each_kept = self.each and name not in self._fixed.inputs
        _require_fit(self._index, name, value, (step.batch, *pool.shape[1:]), pool)
        if each is not None:
            shape = (step.batch, step.new_tokens, *pool.shape[1:])
            _require_fit(self._index, name, each, shape, pool)
        elif each_kept:
            raise ValueError(f"'{name}' needs its value after each token (state.each)")
        step.wrote_fixed = True
        self._fixed.form(name).put(pool, value, each if each_kept else None)

    def slots(self, name: str) -> Slots:
        """As `archs.state.LayerState.slots`."""
        fixed = self._fixed
        if name in fixed.inputs:
            assert fixed.replays is not None
            return fixed.replays.slots(fixed.pools[name])
        if not isinstance(fixed.values, Slotted):
            raise ValueError(_NO_KERNELS)
        return fixed.values.slots(fixed.pools[name])

    def replayed(self, name: str) -> Replayed | None:
        """As `archs.state.LayerState.replayed`."""
        found = self._fixed.replayed(name)
        # What is handed out may be written into; inputs overwrite nothing that is held.
        self._step.wrote_fixed |= found is not None and (found.folds or found.whole)
        return found


_NO_KERNELS = "kernels read and write the state of a store that is opened with kernels=True"


def _require_fit(layer: int, name: str, given: Tensor, shape: Sequence[int], held: Tensor) -> None:
    """Raise UserError unless `given` has this shape and the dtype of the store's tensor."""
    if given.shape != tuple(shape):
        raise UserError(
            f"layer {layer} gives '{name}' of shape {list(given.shape)} where this step and its "
            f"state_spec say {list(shape)}; make both agree"
        )
    _require_dtype(layer, name, given.dtype, held)


def _require_dtype(layer: int, name: str, dtype: torch.dtype, held: Tensor) -> None:
    """Raise UserError unless the store's tensor has this dtype."""
    if dtype != held.dtype:
        raise UserError(
            f"layer {layer} gives '{name}' in {dtype} and its state_spec declares {held.dtype}; "
            "declare what the mixer gives, or convert in the mixer"
        )
