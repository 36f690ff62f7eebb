"""What a mixer must remember, declared tensor by tensor.

A *row tensor* gains rows as tokens come; a *fixed tensor* has one value per sequence. Allocation,
paging, byte accounting, fork and rollback follow from the declaration, so no architecture writes
storage code. Bytes are those of the formats, scales included.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, prod
from typing import Self

import torch

from archs.errors import UserError
from archs.formats import Format

#: Up to this many new tokens the recurrent form is used, above it the chunked one: eight drafts and
#: the token before them.
RECURRENT_LIMIT = 9


def kept_states(new_tokens: int, lookback: int) -> int:
    """Values of a fixed tensor that a step of `new_tokens` writes, the newest ones.

    Steps beyond the recurrent form have no values between their tokens: the last one is kept.
    """
    return min(new_tokens, lookback + 1) if new_tokens <= RECURRENT_LIMIT else 1


@dataclass(frozen=True, slots=True)
class Replay:
    """Steps of `new_tokens` tokens on values that are replayed from rings of `rows` inputs.

    A step reads the value, and the inputs of the `held` tokens since; it takes some of them into
    the value where the next step would not find room. Those that `lookback` tokens can still take
    back stay inputs, so that nothing is ever taken out of a value.
    """

    rows: int
    lookback: int

    def folds(self, held: int, new_tokens: int) -> int:
        """How many of the held inputs a step takes into the value; it is not written for 0."""
        if new_tokens == 0 or held + new_tokens + self.lookback + 1 <= self.rows:
            return 0
        return max(0, held - max(0, self.lookback - new_tokens))

    def overflows(self, held: int, new_tokens: int) -> bool:
        """Whether a step finds no room, or leaves none for the next one of `lookback` + 1 tokens:
        all that is held, and its own tokens, go into the value.
        """
        most = min(self.rows - held, self.rows - self.lookback - 1, RECURRENT_LIMIT)
        return new_tokens > most

    def mean(self, new_tokens: int) -> tuple[Fraction, Fraction]:
        """Inputs held before a step, and writes of the value in it, over many steps that keep
        all their tokens.
        """
        if self.overflows(0, new_tokens):
            return Fraction(0), Fraction(1)
        held, seen, writes = 0, list[int](), list[bool]()
        while held not in seen:
            seen.append(held)
            full = self.overflows(held, new_tokens)
            taken = held if full else self.folds(held, new_tokens)
            writes.append(full or taken > 0)
            held = 0 if full else held + new_tokens - taken
        first = seen.index(held)
        steps = len(seen) - first
        return Fraction(sum(seen[first:]), steps), Fraction(sum(writes[first:]), steps)


def require_replay(rows: int, lookback: int) -> None:
    """Raise UserError unless rings of so many inputs serve; 0: copies are kept instead."""
    if rows < 0 or (rows and rows < 2 * (lookback + 1)):
        raise UserError(
            f"replay={rows} with lookback={lookback}: a ring holds the inputs of two steps of "
            f"{lookback + 1} tokens at least; take replay={2 * (lookback + 1)} or more, or 0 for "
            "copies"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """What both kinds declare.

    shape: of one row, or of the value. format: of numbers of its last dimension, stored together.
    shards: equal parts that several GPUs can hold apart, such as KV heads or channels; 1: what
    every GPU would need whole.
    kind: what the numbers are, by which formats of state are asked for (`archs.state_formats`).
    given: the dtype that the mixer gives and gets (None: the format's).
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    shards: int = 1
    kind: str = ""
    given: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.given is None and not self.format.is_plain:
            raise UserError(
                f"state tensor '{self.name}' is stored as {self.format}; say in which dtype the "
                "mixer gives it (given=torch.float32)"
            )
        if self.shards < 1 or prod(self.shape) % self.shards:
            raise UserError(
                f"state tensor '{self.name}' of shape {list(self.shape)} has no {self.shards} "
                "equal shards; choose a number that divides its size"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of one row, or of the value."""
        return prod(self.shape[:-1]) * self.format.nbytes(prod(self.shape[-1:]))

    @property
    def given_dtype(self) -> torch.dtype:
        """The dtype that the mixer gives and gets."""
        return self.given or self.format.dtype

    @property
    def is_coded(self) -> bool:
        """Whether what the mixer gives is stored as something else."""
        return not self.format.is_exact or self.given_dtype != self.format.dtype

    def part(self, gpus: int) -> Self:
        """What one of `gpus` GPUs holds, flat: the most shards that any of them gets."""
        size = prod(self.shape) // self.shards * ceil(self.shards / gpus)
        return replace(self, shape=(size,), shards=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSpec(TensorSpec):
    """Rows that come with the tokens: one for every `every` tokens, once they are complete.

    What is not yet a whole row is a fixed tensor of the same layer.

    window: newest rows that a token sees, its own included (None: all of them).
    sinks:  first rows that stay visible beside the window.
    owner:  index of the layer that appends them; this one only reads.
    picks:  rows that a token reads of those it sees, chosen by the mixer (None: all of them); a
            step of many tokens reads every row once at most.
    block:  the fixed tensor in which rows wait until there are `every` of them, which are then
            stored together as one (None: rows are stored as the mixer gives them).
    """

    kind: str = "kv"
    every: int = 1
    window: int | None = None
    sinks: int = 0
    owner: int | None = None
    picks: int | None = None
    block: str | None = None

    def __post_init__(self) -> None:
        TensorSpec.__post_init__(self)
        for name in ("every", "window", "picks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"'{self.name}': {name}={value} must be at least 1")
        if self.sinks < 0:
            raise UserError(f"'{self.name}': sinks={self.sinks} must be at least 0")
        if self.sinks and self.window is None:
            raise UserError(
                f"'{self.name}': sinks={self.sinks} only make sense beside a window; set window"
            )

    def rows(self, tokens: int) -> int:
        """Complete rows of `tokens` tokens."""
        return tokens // self.every

    def new_rows(self, context: int, new_tokens: int) -> int:
        """Rows that `new_tokens` tokens after `context` complete."""
        return self.rows(context + new_tokens) - self.rows(context)

    def visible_rows(self, context: int, new_tokens: int = 0) -> int:
        """Rows that `new_tokens` tokens after `context` see between them, new ones included."""
        if self.window is None:
            return self.rows(context + new_tokens)
        new = self.new_rows(context, new_tokens)
        return min(self.rows(context), self.window - (new > 0) + self.sinks) + new

    def read_bytes(self, context: int, new_tokens: int = 1) -> int:
        """Bytes that one sequence reads of them."""
        visible = self.visible_rows(context, new_tokens)
        if self.picks is None:
            return visible * self.nbytes
        return min(new_tokens * self.picks, visible) * self.nbytes

    def held_pages(self, context: int, page_size: int, lookback: int = 0) -> int:
        """Pages that one sequence holds of them; 0 where another layer owns them."""
        if self.owner is not None:
            return 0
        rows = self.rows(context)
        last = ceil(rows / page_size)
        if self.window is None:
            return last
        first = max(0, rows - self.window - max(0, self.kept_back(lookback) - 1)) // page_size
        return last - first + min(first, ceil(self.sinks / page_size))

    def kept_back(self, lookback: int) -> int:
        """Rows beyond the window that are kept so that `lookback` tokens can be taken back."""
        return ceil(lookback / self.every)


@dataclass(frozen=True, slots=True)
class Keeping:
    """Rows of which the store keeps `rows`, by the attention that each has had.

    newest: of them, which stay whatever they get. fade: of a row's sum, at each token.
    """

    rows: int
    newest: int
    fade: float


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedSpec(TensorSpec):
    """One value per sequence, whatever the context.

    inputs: of one token, from which the mixer computes the value after it: a store may keep a ring
    of them instead of a copy of the value for each token (None: copies alone serve).
    keeps: of the rows of a mixer that the store chooses among, [2, G, rows, d] (None: the mixer
    puts the value itself).
    """

    kind: str = "memory"
    inputs: TensorSpec | None = None
    keeps: Keeping | None = None

    def written_bytes(self, new_tokens: int, lookback: int) -> int:
        """Bytes that a step writes of it, replay apart: of rows only those of the new tokens,
        where no copies are kept.
        """
        if self.keeps is not None and lookback == 0:
            return min(new_tokens, self.keeps.rows) * self.nbytes // self.keeps.rows
        return kept_states(new_tokens, lookback) * self.nbytes

    def held_bytes(self, context: int, lookback: int = 0, replay: int = 0) -> int:
        """Bytes that one sequence holds after `context` tokens, taken one by one.

        replay: inputs in a ring; 0: copies for as many tokens as can be taken back.
        """
        if replay and self.inputs is not None:
            return min(context, 1) * (self.nbytes + replay * self.inputs.nbytes)
        return min(context, lookback + 1) * self.nbytes

    def part(self, gpus: int) -> Self:
        """As `TensorSpec.part`, of the inputs, too."""
        inputs = None if self.inputs is None else self.inputs.part(gpus)
        return replace(TensorSpec.part(self, gpus), inputs=inputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSpec:
    """The state of one layer for one sequence."""

    rows: tuple[RowSpec, ...] = ()
    fixed: tuple[FixedSpec, ...] = ()

    def __post_init__(self) -> None:
        for kind, wanted, tensors in (
            ("rows", RowSpec, self.rows),
            ("fixed", FixedSpec, self.fixed),
        ):
            for tensor in tensors:
                if not isinstance(tensor, wanted):
                    raise UserError(
                        f"'{tensor.name}' in {kind} is a {type(tensor).__name__}; declare it as a "
                        f"{wanted.__name__}"
                    )
        names = [t.name for t in (*self.rows, *self.fixed)]
        if len(set(names)) != len(names):
            raise UserError(f"state tensors {names} repeat a name; each needs its own")

    @property
    def owned(self) -> tuple[RowSpec, ...]:
        """Row tensors that this layer appends to."""
        return tuple(t for t in self.rows if t.owner is None)

    def visible_rows(self, rows: RowSpec, context: int, new_tokens: int) -> int:
        """Rows of a mixer's row tensor that `new_tokens` tokens see, as they are kept here."""
        for value in self.fixed:
            if value.name == rows.name and value.keeps is not None:
                return value.keeps.rows
        # Rows that are stored in blocks are seen one by one.
        kept = [t for t in self.rows if t.name == rows.name and t.block is None]
        return (kept[0] if kept else rows).visible_rows(context, new_tokens)

    def split(self, gpus: int) -> "StateSpec":
        """What one of `gpus` GPUs holds, flat."""
        return replace(
            self,
            rows=tuple(t.part(gpus) for t in self.rows),
            fixed=tuple(t.part(gpus) for t in self.fixed),
        )

    @property
    def fixed_bytes(self) -> int:
        """Bytes of one value of every fixed tensor."""
        return sum(t.nbytes for t in self.fixed)

    @property
    def bytes_per_token(self) -> float:
        """Slope of the owned state in the context: windows have none."""
        growing = (t for t in self.owned if t.window is None)
        slope = sum((Fraction(t.nbytes, t.every) for t in growing), Fraction(0))
        return slope.numerator if slope.denominator == 1 else float(slope)

    def state_bytes(
        self, context: int, *, page_size: int = 1, lookback: int = 0, replay: int = 0
    ) -> int:
        """Bytes one sequence holds after `context` tokens; equals what the store allocates.

        `lookback` tokens can be taken back: windows keep rows for it beyond their own, and fixed
        tensors a value for each length in reach, or one and a ring of `replay` inputs.
        """
        rows = sum(
            t.held_pages(context, page_size, lookback) * page_size * t.nbytes for t in self.rows
        )
        return rows + sum(t.held_bytes(context, lookback, replay) for t in self.fixed)

    def scanned_bytes(self, context: int, new_tokens: int = 1) -> int:
        """Bytes of rows that one sequence reads from first to last when it is extended."""
        return _read((t for t in self.rows if t.picks is None), context, new_tokens)

    def gathered_bytes(self, context: int, new_tokens: int = 1) -> int:
        """Bytes of rows that one sequence reads because its mixer picked them."""
        return _read((t for t in self.rows if t.picks is not None), context, new_tokens)

    def replayed(self, replay: int) -> tuple[FixedSpec, ...]:
        """Fixed tensors that a store with rings of so many inputs replays."""
        return tuple(t for t in self.fixed if replay and t.inputs is not None)

    def read_bytes(
        self, context: int, new_tokens: int = 1, *, lookback: int = 0, replay: int = 0
    ) -> int:
        """Bytes of state one sequence reads when it is extended by `new_tokens`; of inputs the
        mean over many such steps.
        """
        held, _ = Replay(replay, lookback).mean(new_tokens)
        inputs = sum(t.inputs.nbytes for t in self.replayed(replay) if t.inputs is not None)
        return _read(self.rows, context, new_tokens) + self.fixed_bytes + round(held * inputs)

    def write_bytes(
        self, new_tokens: int = 1, *, context: int = 0, lookback: int = 0, replay: int = 0
    ) -> int:
        """Bytes of state one sequence writes when it is extended by `new_tokens`; of values that
        are replayed the mean over many such steps.
        """
        written = sum(t.new_rows(context, new_tokens) * t.nbytes for t in self.owned)
        _, share = Replay(replay, lookback).mean(new_tokens)
        for tensor in self.fixed:
            if not replay or tensor.inputs is None:
                written += tensor.written_bytes(new_tokens, lookback)
                continue
            written += round(share * tensor.nbytes)
            if new_tokens <= RECURRENT_LIMIT:
                written += new_tokens * tensor.inputs.nbytes
        return written


def _read(rows: Iterable[RowSpec], context: int, new_tokens: int) -> int:
    return sum(t.read_bytes(context, new_tokens) for t in rows)
