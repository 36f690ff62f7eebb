"""What a mixer must remember, declared; and the face of the store that a mixer sees.

A `StateSpec` names per-token tensors (rows that grow with the context, possibly bounded by a
window) and fixed tensors (one per sequence). Allocation, paging, byte accounting, fork and
rollback all follow from it, so no architecture writes storage code. `LayerState` is what
`Mixer.extend` gets: it never tells a layer how its rows are stored, and no layer advances a
position.
"""

from dataclasses import dataclass
from math import ceil, prod
from typing import Protocol

import torch
from torch import Tensor

from archs.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One remembered tensor: `shape` per token row, or per sequence when fixed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

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

    rows:   [B, S, *shape], new rows included.
    mask:   bool [1 or B, 1, K, S], True where the token may look; None when `causal` says all.
    causal: True when rows are exactly the new tokens and token i sees rows 0..i.
    """

    rows: Tensor
    mask: Tensor | None
    causal: bool


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

    def append(self, name: str, rows: Tensor) -> Seen:
        """Store the new rows [B, K, *shape] and return all rows the new tokens may see."""
        ...

    def seen(self, name: str) -> Seen:
        """What the owner's `append` returned in this step (layers that share its rows)."""
        ...

    def get(self, name: str) -> Tensor:
        """A fixed tensor [B, *shape]; writing into it in place is allowed, then `put` it."""
        ...

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        """The fixed tensor after the new tokens [B, *shape]; `each` [B, K, *shape]."""
        ...
