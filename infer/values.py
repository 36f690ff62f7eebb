"""How the values of a step's fixed tensors are got and put: in place, in slots, or replayed."""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import NamedTuple, Protocol

from torch import Tensor

from archs.spec import Keeping
from archs.state import Replayed, Slots
from infer.books import Books
from infer.coding import Coding


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

    pools, inputs, codings: as `infer.pools.LayerTensors.fixed` and others. values: of those that
    are kept in copies; replays: of the others. keeps: of those that are rows of a mixer.
    """

    pools: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    values: ValueForm
    replays: Replays | None
    codings: Mapping[str, Coding]
    keeps: Mapping[str, Keeping]

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
