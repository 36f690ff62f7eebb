"""One layer's state in one step: the only `LayerState` there is, whatever runs the layers.

What a layer gives is what it declared: a store casts and broadcasts nothing that was not. What
differs between a plain batch, any other, kernels and compiled code are the forms that its tensors
come in: `RowForm` stores and sees rows, `ValueForm` gets and puts values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from archs.errors import UserError
from archs.spec import Keeping
from archs.state import PagedSeen, Pages, Replayed, Rows, Seen, Slots
from infer.blocks import append_blocks
from infer.choosing import Choosing
from infer.coding import Coding
from infer.rows import Held, InPages, Joined, RowForm
from infer.values import Fixed, Slotted


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
    def rope(self, dim: int, theta: float, turned: int | None = None) -> Tensor: ...
    def rotary(self, dim: int, theta: float, turned: int | None = None) -> Tensor: ...


class RowTensor(NamedTuple):
    """A row tensor of a layer in a step.

    shape: of the new rows of one sequence, padding included: [R, *shape]. coding: where they are
    stored otherwise than they come. block: the fixed tensor in which they wait for others. every:
    tokens of a row.
    """

    held: Held
    form: RowForm
    shape: tuple[int, ...]
    coding: Coding | None = None
    block: str | None = None
    every: int = 1


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

    def rope(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `archs.state.LayerState.rope`."""
        return self._step.rope(dim, theta, turned)

    def rotary(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `archs.state.LayerState.rotary`."""
        return self._step.rotary(dim, theta, turned)

    # -- rows ------------------------------------------------------------------------------------

    @property
    def gathered(self) -> bool:
        """Whether rows of pages were gathered instead of being left to a kernel."""
        return any(isinstance(s, PagedSeen) and s.gathered for s in self._seen.values())

    def append(self, name: str, rows: Tensor) -> Rows:
        """As `archs.state.LayerState.append`."""
        keeps = self._fixed.keeps.get(name)
        if keeps is not None:
            return self._append_kept(name, rows, keeps)
        held, form, shape, coding, block, every = self._row(name)
        dtype = held.pool.dtype if coding is None else coding.given
        _require_fit(self._index, name, rows, (self._step.batch, *shape), dtype)
        self._step.wrote_rows = True
        if coding is None:
            seen = form.append(held, rows)
        elif held.scales is not None:
            seen = _append_codes(held, held.scales, form, coding, rows)
        elif block is None:
            ends = self._ends(rows.shape[1], every) if coding.is_random else None
            found = form.append(held, coding.encode(rows, ends))
            seen = Seen(coding.decode(found.rows), found.mask, found.causal)
        else:
            seen = self._append_blocks(held, form, coding, rows, block)
        self._seen[name] = seen
        return seen

    def _append_kept(self, name: str, rows: Tensor, keeps: Keeping) -> Rows:
        pool = self._fixed.pools[name]
        _, heads, _, dim = pool.shape[1:]
        shape = self._step.batch, self._step.new_tokens, 2, heads, dim
        _require_fit(self._index, name, rows, shape, pool.dtype)
        self._seen[name] = seen = Choosing(self, name, rows, keeps)
        return seen

    def _append_blocks(
        self, held: Held, form: RowForm, coding: Coding, rows: Tensor, block: str
    ) -> Seen:
        past = self.past.long()
        found = append_blocks(
            held, form, coding, rows, self.get(block), past, self.new, each=self.each
        )
        self.put(block, found.waiting, found.each)
        return found.seen

    def _ends(self, new: int, every: int = 1) -> Tensor:
        """How many rows of `every` tokens there are with each new one, int64 [B, R]."""
        past = self.past.long() // every
        return past[:, None] + torch.arange(1, new + 1, device=past.device)

    def seen(self, name: str) -> Rows:
        """As `archs.state.LayerState.seen`."""
        return self._owners.get(name, self)._seen[name]

    def pages(self, name: str, dtype: torch.dtype) -> Pages | None:
        """As `archs.state.LayerState.pages`."""
        if name in self._fixed.keeps:
            return None
        held, form, _, coding, *_ = self._row(name)
        if coding is not None:
            _require_dtype(self._index, name, dtype, coding.given)
            return None
        _require_dtype(self._index, name, dtype, held.pool.dtype)
        if isinstance(form, InPages):
            return form.books.pages(held.pool)
        if isinstance(form, Joined):
            return None
        raise ValueError(_NO_KERNELS)

    def written(self, name: str) -> Rows:
        """As `archs.state.LayerState.written`."""
        held, form, *_ = self._row(name)
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
        held = self._fixed.form(name).get(self._fixed.pools[name])
        coding = self._fixed.codings.get(name)
        return held if coding is None else coding.decode(held)

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        """As `archs.state.LayerState.put`."""
        step, pool, coding = self._step, self._fixed.pools[name], self._fixed.codings.get(name)
        each_kept = self.each and name not in self._fixed.inputs
        shape, dtype = tuple(pool.shape[1:]), pool.dtype
        if coding is not None:
            shape, dtype = (*shape[:-1], coding.numbers), coding.given
        _require_fit(self._index, name, value, (step.batch, *shape), dtype)
        if each is not None:
            _require_fit(self._index, name, each, (step.batch, step.new_tokens, *shape), dtype)
        elif each_kept:
            raise ValueError(f"'{name}' needs its value after each token (state.each)")
        step.wrote_fixed = True
        form, each = self._fixed.form(name), each if each_kept else None
        if coding is not None:
            before = form.get(pool) if coding.feeds_back else None
            ends = last = None
            if coding.is_random:
                ends = self._ends(step.new_tokens)
                last = ends[:, -1] if self.new is None else self.past.long() + self.new
            each = None if each is None else coding.encode(each, ends, before)
            value = coding.encode(value, last, before)
        form.put(pool, value, each)

    def slots(self, name: str) -> Slots:
        """As `archs.state.LayerState.slots`."""
        fixed = self._fixed
        if name in fixed.codings and fixed.pools[name].dtype == torch.uint8:
            raise ValueError(_NO_CODES)
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
_NO_CODES = "no kernel reads a state in this format; the engine refuses such stores for kernels"


def _append_codes(
    held: Held, scales: Tensor, form: RowForm, coding: Coding, rows: Tensor
) -> PagedSeen:
    """Store new rows as codes, their scales apart; what is seen stays in pages, for kernels."""
    dtype = coding.format.dtype
    seen: Rows
    if isinstance(form, InPages):
        form.books.write_codes(held.pool.view(dtype), scales[..., 0], rows)
        seen, by = form.see(held), scales
    else:
        codes, sizes = coding.apart(rows)
        seen, joined = form.append(held, codes), form.append(Held(scales, None), sizes)
        assert isinstance(joined, PagedSeen)
        by = joined.pages.pool
    assert isinstance(seen, PagedSeen)
    pages = replace(
        seen.pages, pool=seen.pages.pool.view(dtype), scales=by[..., 0], given=coding.given
    )
    return PagedSeen(pages, seen.new_tokens, seen.length)


def _require_fit(
    layer: int, name: str, given: Tensor, shape: Sequence[int], dtype: torch.dtype
) -> None:
    """Raise UserError unless `given` has this shape and the dtype that is declared."""
    if given.shape != tuple(shape):
        raise UserError(
            f"layer {layer} gives '{name}' of shape {list(given.shape)} where this step and its "
            f"state_spec say {list(shape)}; make both agree"
        )
    _require_dtype(layer, name, given.dtype, dtype)


def _require_dtype(layer: int, name: str, given: torch.dtype, declared: torch.dtype) -> None:
    """Raise UserError unless what is given has the dtype that is declared."""
    if given != declared:
        raise UserError(
            f"layer {layer} gives '{name}' in {given} and its state_spec declares {declared}; "
            "declare what the mixer gives, or convert in the mixer"
        )
