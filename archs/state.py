"""The face of the store that a mixer sees: one layer's state during one `extend`.

`LayerState` never tells a layer how its tensors are stored, and no layer advances a position.
Torch forms read what `append`, `seen` and `get` return; kernels read and write `Pages` and `Slots`
where they lie.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

#: The position of a row that no token may see; a power of two, so exact as a float too.
NEVER = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """A row tensor as a kernel reads and writes it: in pages behind a block table.

    pool:     [*planes, pages * page_size, row].
    table:    int32 [B, max_pages], the pool page of each page of a sequence.
    past:     int32 [B], rows before this step; total: int32 [B], with those of its K tokens.
    new:      int32 [B] valid new rows of a right-padded batch (None: all).
    ends:     int64 [B, K], before which row each new token sees (None: token t sees `past + t`
      and those before it, the plain case that kernels know).
    scales:   float32 [*planes, pages * page_size], what a row's 8-bit codes are multiplied by, and
      given, the dtype of what they stand for (None: rows are stored as they come).
    """

    pool: Tensor
    table: Tensor
    past: Tensor
    total: Tensor
    new: Tensor | None
    page_size: int
    window: int | None
    sinks: int
    ends: Tensor | None = None
    scales: Tensor | None = None
    given: torch.dtype | None = None

    def pages_at(self, new_tokens: int, bound: int) -> tuple[Tensor, Tensor]:
        """Pool pages that hold all that the new tokens may see, int64 [B, P], and the positions of
        their rows, int64 [B, P * page_size].

        What nobody may see is among them. bound: most rows that a sequence has.
        """
        size, most, device = self.page_size, self.table.shape[1], self.table.device
        pages = torch.arange(min(-(-bound // size), most), device=device)[None]
        again = torch.zeros_like(pages, dtype=torch.bool)
        sink_pages = -(-self.sinks // size)
        if self.window is not None:
            count = -(-(self.window + new_tokens) // size) + 1
            if sink_pages + count < pages.shape[1]:
                oldest = (self.past.long() - self.window + 1).clamp(min=0) // size
                near = oldest[:, None] + torch.arange(count, device=device)
                sunk = torch.arange(sink_pages, device=device).expand(near.shape[0], -1)
                # A page among the sinks must not be seen a second time within the window.
                again = torch.cat((torch.zeros_like(sunk, dtype=torch.bool), near < sink_pages), 1)
                again |= torch.cat((sunk, near), 1) >= most
                pages = torch.cat((sunk, near), 1).clamp(max=most - 1)
        pages = pages.expand(self.table.shape[0], -1)
        offsets = torch.arange(size, device=device)
        positions = pages[..., None] * size + offsets
        positions = positions.masked_fill(again.expand_as(pages)[..., None], NEVER)
        return self.table.long().gather(1, pages), positions.flatten(1)

    def mask_of(self, rows_at: Tensor, new_tokens: int) -> Tensor:
        """bool [B, 1, K, S]: which rows, at positions [1 or B, S], each new token may see."""
        ends = self.ends
        if ends is None:
            new = torch.arange(1, new_tokens + 1, device=rows_at.device)
            ends = self.past.long()[:, None] + new
        return visible(rows_at, ends, self.window, self.sinks)


def visible(rows_at: Tensor, ends: Tensor, window: int | None, sinks: int) -> Tensor:
    """Which rows a token may see: those before its end, of which the newest `window` and the sinks.

    rows_at: positions [1 or B, S]; ends: [1 or B, K]. Returns bool [1 or B, 1, K, S].
    """
    row, end = rows_at[:, None, :], ends[:, :, None]
    mask = row < end
    if window is not None:
        mask &= (row >= end - window) | (row < sinks)
    return mask.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Seen:
    """The rows of a row tensor that this step's new tokens may see, new rows included.

    rows:   [B, *planes, S, row].
    mask:   bool [1 or B, 1, K, S], True where the token may look; None where it may everywhere, or
      `causal` says it all.
    causal: True where rows are exactly those of the new tokens and token i sees rows 0..i.
    """

    rows: Tensor
    mask: Tensor | None
    causal: bool

    @property
    def length(self) -> int:
        """S, rows that a token may see at most."""
        return self.rows.shape[-2]


class PagedSeen:
    """As `Seen`, of rows in pages that kernels read where they lie; gathered if asked for.

    bound: most rows that a sequence of this step has, those of its K new tokens included.
    """

    causal = False

    def __init__(self, pages: Pages, new_tokens: int, bound: int) -> None:
        self.pages = pages
        self.new_tokens = new_tokens
        self.length = bound

    @property
    def gathered(self) -> bool:
        """Whether rows or their mask have been asked for."""
        return "_pages_at" in self.__dict__

    @cached_property
    def _pages_at(self) -> tuple[Tensor, Tensor]:
        return self.pages.pages_at(self.new_tokens, self.length)

    @cached_property
    def rows(self) -> Tensor:
        """[B, *planes, S, row]: a copy of the pages, codes as what they stand for."""
        p = self.pages
        if p.scales is None:
            return self._gathered(p.pool)
        # Floats of 8 bits can be moved as bytes alone.
        codes = self._gathered(p.pool.view(torch.uint8)).view(p.pool.dtype)
        return codes.to(p.given) * self._gathered(p.scales[..., None]).to(p.given)

    def _gathered(self, pool: Tensor) -> Tensor:
        pages = self._pages_at[0]
        paged = pool.unflatten(-2, (-1, self.pages.page_size))
        # Whole pages by one index: on a CPU single rows take 1.6 to 5 times as long.
        found = paged.index_select(-3, pages.flatten()).unflatten(-3, pages.shape)
        return found.flatten(-3, -2).movedim(-3, 0)

    @cached_property
    def mask(self) -> Tensor:
        """bool [B, 1, K, S]."""
        return self.pages.mask_of(self._pages_at[1], self.new_tokens)


class Kept(ABC):
    """Rows of which the store keeps some, chosen by the attention that they get.

    What a token sees depends on what those before it have asked, so rows are asked, never read.
    """

    causal = False

    @abstractmethod
    def attend(self, q: Tensor) -> Tensor:
        """As `archs.ops.attention.attend`, q: [B, K, H, d] -> [B, K, H, d]; once in a step."""

    @property
    def rows(self) -> Tensor:
        """Raises ValueError, as the others do."""
        raise ValueError("rows that a store drops are read by attention alone (`Mixer.evictable`)")

    @property
    def mask(self) -> Tensor:
        """Never there."""
        return self.rows

    @property
    def length(self) -> int:
        """Never there."""
        return len(self.rows)


Rows = Seen | PagedSeen | Kept


def pages_of(seen: Rows) -> Pages | None:
    """The pages of rows that attention kernels can read; None: only the rows themselves.

    Kernels know rows of one token each, of which a token sees its own.
    """
    if not isinstance(seen, PagedSeen) or seen.pages.ends is not None:
        return None
    return seen.pages


def mask_of(seen: Rows, new_tokens: int) -> Tensor:
    """bool [1 or B, K, S]: which rows each of K new tokens may see, said in full."""
    if seen.mask is not None:
        return seen.mask.squeeze(1)
    everything = torch.ones(1, new_tokens, seen.length, dtype=torch.bool, device=seen.rows.device)
    return everything.tril() if seen.causal else everything


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """A fixed tensor as a kernel updates it: read from one slot, written to others.

    pool:  [slots, *shape].
    read:  int32 [B], the slot of the value before the step.
    write: int32 [B, K], the slot of the value after each token; -1: that one is not kept. The last
      valid token's may be the one that was read.
    last:  int32 [B], the slot of the value after the step; that of padding where no token is valid.
    each:  whether values after tokens before the last valid one are kept, too.
    in_place: whether `last` is what was read, for every sequence of every step.
    new:   int32 [B] valid new tokens of a right-padded batch (None: all K).
    arrivals: int32 zeros that the programs of one norm count in and leave at zero.
    """

    pool: Tensor
    read: Tensor
    write: Tensor
    last: Tensor
    each: bool
    in_place: bool
    new: Tensor | None
    arrivals: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """A fixed tensor of which a sequence has one value, some tokens old, and their inputs.

    values:  pool [slots, *shape].
    inputs:  pool [slots, R, row]; those of the token at position i lie in row i % R.
    slot:    int32 [B], where the value and the inputs of a sequence lie.
    past:    int32 [B], tokens before this step.
    held:    int32 [B], those of them that the value has not taken in: at most `most`.
    fold:    int32 [B], how many of the held ones the value takes in in this step, the oldest first.
    same:    whether every sequence holds `most`.
    folds:   whether `fold` may be more than 0 somewhere.
    whole:   whether the step is as any other but for its begin: it takes all that is held into the
      value, and puts the one after its own tokens. Their inputs are not kept.
    new:     int32 [B] valid new tokens of a right-padded batch (None: all K).
    padding: the slot that takes what is not kept. arrivals: as `Slots`'.
    """

    values: Tensor
    inputs: Tensor
    slot: Tensor
    past: Tensor
    held: Tensor
    fold: Tensor
    most: int
    same: bool
    folds: bool
    whole: bool
    new: Tensor | None
    padding: int
    arrivals: Tensor

    def rows(self) -> Tensor:
        """The held inputs, oldest first, [B, most, row]; a sequence's own are the last `held`."""
        at = self.past.long()[:, None] + self._back
        flat = self.slot.long()[:, None] * self.inputs.shape[1] + at % self.inputs.shape[1]
        return self.inputs.flatten(0, 1)[flat]

    def is_held(self) -> Tensor | None:
        """Which of `rows` are a sequence's own, bool [B, most]; None: all."""
        return None if self.same else self._back >= -self.held[:, None]

    def is_folded(self) -> Tensor:
        """Which of `rows` the value takes in, bool [B, most]."""
        since = self._back + self.held[:, None]
        return (since >= 0) & (since < self.fold[:, None])

    def append(self, rows: Tensor) -> None:
        """Keep the inputs [B, K, row] of the valid new tokens."""
        size = self.inputs.shape[1]
        new = torch.arange(rows.shape[1], device=rows.device)
        slot = self.slot.long()[:, None].expand(-1, rows.shape[1])
        if self.new is not None:
            # What lies past a sequence's count would fall upon what it holds.
            slot = torch.where(new < self.new[:, None], slot, self.padding)
        at = slot * size + (self.past.long()[:, None] + new) % size
        self.inputs.flatten(0, 1)[at.flatten()] = rows.flatten(0, 1)

    @property
    def _back(self) -> Tensor:
        return torch.arange(-self.most, 0, device=self.past.device)


class LayerState(Protocol):
    """One layer's state during one `extend` of K new tokens per sequence.

    new:   int64 [B] valid new tokens of a right-padded batch; None when all K are valid.
    valid: bool [B, K], the same as a mask; None when all K are valid.
    each:  True when `put` also needs the value after every single token (rollback).
    """

    @property
    def new(self) -> Tensor | None:
        """Valid new tokens, int64 [B]."""
        ...

    @property
    def valid(self) -> Tensor | None:
        """Which new tokens are valid, bool [B, K]."""
        ...

    @property
    def each(self) -> bool:
        """Whether values between tokens are kept."""
        ...

    @property
    def positions(self) -> Tensor:
        """Absolute positions of the new tokens, int64 [1 or B, K]."""
        ...

    @property
    def past(self) -> Tensor:
        """Tokens of each sequence before this step, int32 [B]."""
        ...

    def rope(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """Rotary angles of the new tokens, complex64 [1 or B, K, 1, dim/2].

        turned: as in `kernels.rope.torch.rope_table`.
        """
        ...

    def rotary(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """Cosines and sines of all positions, float32 [positions, dim/2, 2], for kernels and for
        rows that are rotated when they are read.
        """
        ...

    def append(self, name: str, rows: Tensor) -> Rows:
        """Store the new rows [B, R, *shape] and return all rows that the new tokens may see.

        R is K, or for one row to `every` tokens ⌈K / every⌉: the rows that the new tokens
        complete, in order; what lies beyond a sequence's own is not looked at.
        Raises UserError for another shape or dtype than was declared, as `put` does.
        """
        ...

    def seen(self, name: str) -> Rows:
        """What `append`, or `written`, of these rows returned in this step, their owner's too."""
        ...

    def get(self, name: str) -> Tensor:
        """A fixed tensor [B, *shape]; writing into it in place is allowed, then `put` it."""
        ...

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        """The fixed tensor after the new tokens [B, *shape]; `each` [B, K, *shape]."""
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
        """Where a kernel reads and writes a fixed tensor."""
        ...

    def replayed(self, name: str) -> Replayed | None:
        """A fixed tensor as it is replayed; None where copies of it are kept.

        `get` and `put` then are of its one value, before the held inputs and after what is folded.
        """
        ...
