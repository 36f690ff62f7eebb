"""What a mixer must remember, declared; and the face of the store that a mixer sees.

A `StateSpec` names per-token tensors (rows that grow with the context, possibly bounded by a
window) and fixed tensors (one per sequence). Allocation, paging, byte accounting, fork and
rollback all follow from it, so no architecture writes storage code. `LayerState` is what
`Mixer.extend` gets: it never tells a layer how its rows are stored, and no layer advances a
position.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, prod
from typing import Protocol

import torch
from torch import Tensor

from archs.errors import UserError

#: The position of a row that no token may see; a power of two, so exact as a float too.
NEVER = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One remembered tensor: `shape` per token row, or per sequence when fixed.

    shards: equal parts that several GPUs can hold apart, such as KV heads or channels; 1: what
    every GPU would need whole.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: int = 1

    def __post_init__(self) -> None:
        if self.shards < 1 or prod(self.shape) % self.shards:
            raise UserError(
                f"state tensor '{self.name}' of shape {list(self.shape)} has no {self.shards} "
                "equal shards; choose a number that divides its size"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (per-token tensors) or of the whole tensor (fixed ones)."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSpec:
    """The state of one layer for one sequence.

    window: newest rows that stay visible, the current token included (None: all of them).
    sinks:  first rows that stay visible beside the window.
    owner:  index of the layer whose `per_token` rows this layer reads; it then owns none.
    """

    per_token: tuple[TensorSpec, ...] = ()
    fixed: tuple[TensorSpec, ...] = ()
    window: int | None = None
    sinks: int = 0
    owner: int | None = None

    def __post_init__(self) -> None:
        names = [t.name for t in (*self.per_token, *self.fixed)]
        if len(set(names)) != len(names):
            raise UserError(f"state tensors {names} repeat a name; each needs its own")
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window} must be at least 1 (it counts the token itself)")
        if self.sinks and self.window is None:
            raise UserError(f"sinks={self.sinks} only make sense beside a window; set window")

    def split(self, gpus: int) -> "StateSpec":
        """What one of `gpus` GPUs holds, flat: the most shards that any of them gets."""

        def part(t: TensorSpec) -> TensorSpec:
            size = prod(t.shape) // t.shards * ceil(t.shards / gpus)
            return replace(t, shape=(size,), shards=1)

        return replace(
            self, per_token=tuple(map(part, self.per_token)), fixed=tuple(map(part, self.fixed))
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's rows as read by this layer, owned or not."""
        return sum(t.row_bytes for t in self.per_token)

    @property
    def fixed_bytes(self) -> int:
        """Bytes per sequence that do not depend on the context."""
        return sum(t.row_bytes for t in self.fixed)

    @property
    def bytes_per_token(self) -> int:
        """Slope of the owned state in the context: 0 under a window and on sharing layers."""
        return 0 if self.window is not None or self.owner is not None else self.token_bytes

    def visible_rows(self, context: int, new_tokens: int = 0) -> int:
        """Rows that `new_tokens` tokens after `context` held ones read, themselves included."""
        if self.window is None:
            return context + new_tokens
        if new_tokens == 0:
            return min(context, self.window + self.sinks)
        return min(context, self.window - 1 + self.sinks) + new_tokens

    def held_pages(self, context: int, page_size: int, lookback: int = 0) -> int:
        """Pages of each owned per-token tensor after `context` tokens."""
        if self.owner is not None or not self.per_token:
            return 0
        last = ceil(context / page_size)
        if self.window is None:
            return last
        first = max(0, context - self.window - max(0, lookback - 1)) // page_size
        return last - first + min(first, ceil(self.sinks / page_size))

    def state_bytes(self, context: int, *, page_size: int = 1, lookback: int = 0) -> int:
        """Bytes one sequence holds after `context` tokens; equals what the store allocates.

        `lookback` tokens can be rolled back: windows keep rows for it beyond their own, and
        fixed tensors one snapshot per length in reach.
        """
        pages = self.held_pages(context, page_size, lookback)
        copies = lookback + 2 if lookback else 1
        return pages * page_size * self.token_bytes + copies * self.fixed_bytes

    def read_bytes(self, context: int, new_tokens: int = 1) -> int:
        """Bytes of state one sequence reads when it is extended by `new_tokens`."""
        return self.visible_rows(context, new_tokens) * self.token_bytes + self.fixed_bytes

    def write_bytes(self, new_tokens: int = 1) -> int:
        """Bytes of state one sequence writes when it is extended by `new_tokens`."""
        rows = 0 if self.owner is not None else new_tokens
        return rows * self.token_bytes + self.fixed_bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """Rows of a per-token tensor as the new tokens of this step may see them.

    rows:   [B, *planes, S, row], new rows included.
    mask:   bool [1 or B, 1, K, S], True where the token may look; None when `causal` says all.
    causal: True when rows are exactly the new tokens and token i sees rows 0..i.
    """

    rows: Tensor
    mask: Tensor | None
    causal: bool

    @property
    def length(self) -> int:
        """S, rows that a token may see at most."""
        return self.rows.shape[-2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """A per-token tensor as a kernel reads and writes it: in pages behind a block table.

    pool:     [*planes, pages * page_size, row].
    table:    int32 [B, max_pages], the pool page of each page of a sequence.
    past:     int32 [B], rows before this step; total: int32 [B], with its K tokens.
    new:      int32 [B] valid new tokens of a right-padded batch (None: all K).
    """

    pool: Tensor
    table: Tensor
    past: Tensor
    total: Tensor
    new: Tensor | None
    page_size: int
    window: int | None
    sinks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """A fixed tensor as a kernel updates it: in place, one slot per sequence.

    pool:  [slots, *shape]; slots: int32 [B].
    new:   int32 [B] valid new tokens of a right-padded batch (None: all K).
    each:  [B, K, *shape], takes the value after every token; None where nothing rolls back.
    arrivals: int32 zeros that the programs of one norm count in and leave at zero.
    """

    pool: Tensor
    slots: Tensor
    new: Tensor | None
    each: Tensor | None
    arrivals: Tensor


class PagedSeen:
    """As `Seen`, over pages that kernels read where they lie; rows are gathered if asked for.

    bound: most rows that a sequence of this step holds, K new ones included.
    """

    causal = False

    def __init__(self, pages: Pages, new_tokens: int, bound: int) -> None:
        self.pages = pages
        self.new_tokens = new_tokens
        self.length = bound

    @property
    def gathered(self) -> bool:
        """Whether rows or their mask have been asked for."""
        return "_rows_at" in self.__dict__

    @cached_property
    def _rows_at(self) -> tuple[Tensor, Tensor]:
        """Pool rows to gather and their positions, int64 [B, S] each; S whole pages."""
        p, size = self.pages, self.pages.page_size
        device, most = p.table.device, p.table.shape[1]
        pages = torch.arange(min(-(-self.length // size), most), device=device)[None]
        again = torch.zeros_like(pages, dtype=torch.bool)
        sink_pages = -(-p.sinks // size)
        if p.window is not None:
            count = -(-(p.window + self.new_tokens) // size) + 1
            if sink_pages + count < pages.shape[1]:
                oldest = (p.past.long() - p.window + 1).clamp(min=0) // size
                near = oldest[:, None] + torch.arange(count, device=device)
                sunk = torch.arange(sink_pages, device=device).expand(near.shape[0], -1)
                # A page among the sinks must not be seen a second time within the window.
                again = torch.cat((torch.zeros_like(sunk, dtype=torch.bool), near < sink_pages), 1)
                again |= torch.cat((sunk, near), 1) >= most
                pages = torch.cat((sunk, near), 1).clamp(max=most - 1)
        pages = pages.expand(p.table.shape[0], -1)
        offsets = torch.arange(size, device=device)
        rows = p.table.long().gather(1, pages)[..., None] * size + offsets
        positions = pages[..., None] * size + offsets
        positions = positions.masked_fill(again.expand_as(pages)[..., None], NEVER)
        return rows.flatten(1), positions.flatten(1)

    @cached_property
    def rows(self) -> Tensor:
        """[B, *planes, S, row]: a copy of the pages, rows that nobody may see included."""
        return self.pages.pool[..., self._rows_at[0], :].movedim(-3, 0)

    @cached_property
    def mask(self) -> Tensor:
        """bool [B, 1, K, S]."""
        p, row = self.pages, self._rows_at[1][:, None, :]
        at = p.past.long()[:, None, None] + torch.arange(
            self.new_tokens, device=row.device
        ).unsqueeze(-1)
        mask = row <= at
        if p.window is not None:
            mask &= (row > at - p.window) | (row < p.sinks)
        return mask.unsqueeze(1)


Rows = Seen | PagedSeen


class LayerState(Protocol):
    """One layer's state during one `extend` of K new tokens per sequence.

    new:       int64 [B] valid new tokens of a right-padded batch; None when all K are valid.
    valid:     bool [B, K], the same as a mask; None when all K are valid.
    each:      True when `put` also needs the value after every single token (rollback).
    """

    new: Tensor | None
    valid: Tensor | None
    each: bool

    @property
    def positions(self) -> Tensor:
        """Absolute positions of the new tokens, int64 [1 or B, K]."""
        ...

    def rope(self, dim: int, theta: float) -> Tensor:
        """Rotary angles of the new tokens, complex64 [1 or B, K, 1, dim/2]."""
        ...

    def append(self, name: str, rows: Tensor) -> Rows:
        """Store the new rows [B, K, *shape] and return all rows the new tokens may see.

        Raises UserError for another shape or dtype than was declared, as `put` does.
        """
        ...

    def seen(self, name: str) -> Rows:
        """What the owner's `append` returned in this step (layers that share its rows)."""
        ...

    def get(self, name: str) -> Tensor:
        """A fixed tensor [B, *shape]; writing into it in place is allowed, then `put` it."""
        ...

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        """The fixed tensor after the new tokens [B, *shape]; `each` [B, K, *shape]."""
        ...


class KernelState(LayerState, Protocol):
    """A `LayerState` that lets kernels write into the store themselves."""

    def rotary(self, dim: int, theta: float) -> Tensor:
        """Cosines and sines of all positions, float32 [positions, dim/2, 2]."""
        ...

    @property
    def past(self) -> Tensor:
        """Tokens of each sequence before this step, int32 [B]."""
        ...

    def pages(self, name: str, dtype: torch.dtype) -> Pages | None:
        """Where a kernel may write new rows in `dtype`; None where they must go through `append`.

        Raises UserError where another dtype was declared.
        """
        ...

    def written(self, name: str) -> Rows:
        """What `append` would return, after a kernel has written the new rows into `pages`."""
        ...

    def slots(self, name: str) -> Slots:
        """Where a kernel updates a fixed tensor; call `settle` afterwards."""
        ...

    def settle(self, name: str, slots: Slots) -> None:
        """Keep what a rollback may need of `slots.each`."""
        ...
