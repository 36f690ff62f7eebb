"""FLOPs and bytes of one step, by operation: the prediction side of every figure.

Convention: a multiply-add is 2 FLOPs. `matrix_flops` is what torch's FLOP counter sees on the
reference path (attention counts the full rectangle of new tokens by visible rows, as that path
computes it); `vector_flops` is everything else, to first order. Bytes are device-memory traffic
of weights and state; activations stay in cache and are not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Self, TypedDict

import torch
from torch import nn

from archs.errors import UserError
from archs.formats import Format
from archs.spec import FixedSpec, Replay, RowSpec, StateSpec, TensorSpec, require_replay


@dataclass(frozen=True, slots=True)
class Step:
    """One `extend`: `batch` sequences, `new_tokens` each, after `context` held tokens.

    lookback: tokens that can be rolled back afterwards, for which values of fixed tensors are kept.
    replay: inputs in a ring from which they are computed anew instead; 0: none.
    """

    batch: int
    new_tokens: int
    context: int
    lookback: int = 0
    replay: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.new_tokens < 1 or self.context < 0 or self.lookback < 0:
            raise UserError(
                f"{self} needs batch >= 1, new_tokens >= 1, context >= 0 and lookback >= 0"
            )
        require_replay(self.replay, self.lookback)

    @property
    def tokens(self) -> int:
        """New tokens over the whole batch."""
        return self.batch * self.new_tokens

    @property
    def replayed(self) -> int:
        """Tokens of each sequence whose inputs a recurrent step takes in once more, on average."""
        if not self.replay:
            return 0
        return round(Replay(self.replay, self.lookback).mean(self.new_tokens)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Coded:
    """Numbers of state that are kept otherwise than they are computed with, for the whole batch.

    format, run: how they are kept, and how many of them together. given: the dtype that the mixer
    computes with. decoded, encoded: how many a step reads and writes, none of which is a copy where
    a kernel reads and writes them as they are kept.
    """

    format: Format
    run: int
    given: torch.dtype
    decoded: int
    encoded: int


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCost:
    """FLOPs and bytes of one named operation, for the whole batch.

    rows: of a product with weights, the rows they are multiplied with; 0 where it is none.
    storage: the format of the weights where it is none of plain numbers. held_bytes: weights that
    larger batches read, where this step does not read them all; 0: it does. coded: what of its
    state is kept otherwise than it is computed with.
    """

    name: str
    matrix_flops: int = 0
    vector_flops: int = 0
    weight_bytes: int = 0
    state_read_bytes: int = 0
    state_write_bytes: int = 0
    rows: int = 0
    storage: str = ""
    held_bytes: int = 0
    coded: tuple[Coded, ...] = ()

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.matrix_flops + self.vector_flops

    @property
    def bytes(self) -> int:
        """All device-memory traffic."""
        return self.weight_bytes + self.state_read_bytes + self.state_write_bytes

    @property
    def intensity_flop_per_byte(self) -> float:
        """Arithmetic intensity of this operation alone."""
        return self.flops / self.bytes if self.bytes else float("inf")


@dataclass(frozen=True, slots=True)
class Cost:
    """The operations of one step; costs add up."""

    ops: tuple[OpCost, ...] = ()

    @classmethod
    def of(cls, *ops: OpCost) -> Self:
        """A cost from its operations."""
        return cls(tuple(ops))

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.ops + other.ops)

    @staticmethod
    def total(costs: Iterable["Cost"]) -> "Cost":
        """All operations of several costs."""
        return Cost(tuple(op for cost in costs for op in cost.ops))

    @property
    def flops(self) -> int:
        """All FLOPs of the step."""
        return sum(op.flops for op in self.ops)

    @property
    def matrix_flops(self) -> int:
        """FLOPs that the FLOP counter sees."""
        return sum(op.matrix_flops for op in self.ops)

    @property
    def bytes(self) -> int:
        """Weights read + state read + state written."""
        return sum(op.bytes for op in self.ops)

    @property
    def weight_bytes(self) -> int:
        """Weights read."""
        return sum(op.weight_bytes for op in self.ops)

    @property
    def state_bytes(self) -> int:
        """State read and written."""
        return sum(op.state_read_bytes + op.state_write_bytes for op in self.ops)

    @property
    def intensity_flop_per_byte(self) -> float:
        """FLOP per byte of device-memory traffic."""
        return self.flops / self.bytes


def linear_cost(name: str, layer: nn.Linear, tokens: int) -> OpCost:
    """A projection of `tokens` rows: weights read once, 2 FLOPs per weight and row.

    Weights are read in the layer's format where it names one (`archs.layers.Projection`:
    `weight_bytes` and `storage`), else as their dtype.
    """
    weights, bias = layer.in_features * layer.out_features, layer.bias
    stored: int | None = getattr(layer, "weight_bytes", None)
    if stored is None:
        stored = Format.of(layer.weight.dtype).nbytes(weights)
    return OpCost(
        name=name,
        matrix_flops=2 * tokens * weights,
        vector_flops=0 if bias is None else tokens * bias.numel(),
        weight_bytes=stored + (0 if bias is None else bias.nbytes),
        rows=tokens,
        storage=getattr(layer, "storage", ""),
    )


class Traffic(TypedDict):
    """What an operation moves of the state, for the whole batch: `OpCost`'s fields."""

    state_read_bytes: int
    state_write_bytes: int
    coded: tuple[Coded, ...]


def state_traffic(spec: StateSpec, step: Step) -> Traffic:
    """What a step reads and writes of the state that `spec` declares, values for rollback too."""
    rollback = {"lookback": step.lookback, "replay": step.replay}
    read = spec.read_bytes(step.context, step.new_tokens, **rollback)
    written = spec.write_bytes(step.new_tokens, context=step.context, **rollback)
    return {
        "state_read_bytes": step.batch * read, "state_write_bytes": step.batch * written,
        "coded": tuple(_coded(t, step) for t in (*spec.owned, *spec.fixed) if t.is_coded),
    }  # fmt: skip


def _coded(tensor: TensorSpec, step: Step) -> Coded:
    """Rows are decoded whole, picked ones among all that are seen, by the layer that owns them."""
    if isinstance(tensor, RowSpec):
        decoded = tensor.visible_rows(step.context, step.new_tokens)
        encoded: float = tensor.new_rows(step.context, step.new_tokens)
    else:
        assert isinstance(tensor, FixedSpec)
        decoded = 1
        if step.replay and tensor.inputs is not None:
            encoded = float(Replay(step.replay, step.lookback).mean(step.new_tokens)[1])
        else:
            encoded = tensor.written_bytes(step.new_tokens, step.lookback) / tensor.nbytes
    numbers = step.batch * prod(tensor.shape)
    return Coded(
        format=tensor.format, run=tensor.shape[-1], given=tensor.given_dtype,
        decoded=decoded * numbers, encoded=round(encoded * numbers),
    )  # fmt: skip


def attention_cost(
    rows: RowSpec, step: Step, *, heads: int, qk_dim: int, v_dim: int,
    kept: StateSpec | None = None,
) -> OpCost:  # fmt: skip
    """Softmax attention over the visible ones of `rows`, and their traffic, as they are `kept`
    (None: as they are given).

    Matrix FLOPs 2·B·H·K·S·(d_qk + d_v) over S visible rows; about 5 vector FLOPs per score.
    """
    kept = StateSpec(rows=(rows,)) if kept is None else kept
    scores = step.tokens * heads * kept.visible_rows(rows, step.context, step.new_tokens)
    return OpCost(
        name="attention",
        matrix_flops=2 * scores * (qk_dim + v_dim),
        vector_flops=5 * scores,
        **state_traffic(kept, step),
    )
