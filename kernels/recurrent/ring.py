"""Inputs that a recurrent state has yet to take in, so that the large state is seldom written.

For each slot a ring of R rows holds the raw inputs of the last tokens, and the state in the slot is
that after all but the last `held` of them. A step replays these on the state in registers, with the
operations of the token loop and in its order, then takes the new tokens and appends their inputs.
It stores the state only where `fold` names how many of the held inputs the slot takes in. A new row
must not overwrite a held one, which other programs may still read: held + K <= R. Values are the
caller's to keep right; checking them would wait for the device.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import form, require
from kernels.recurrent.step import require_slots


@triton.jit
def ring_row(rows, position, R: tl.constexpr, ROW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the inputs of the token at a position lie; rows: one slot's."""
    return rows + (position % R).to(tl.int64) * ROW


@triton.jit
def store_as(at, x, mask):  # type: ignore[no-untyped-def]
    """Store x in the type that lies there."""
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


class Ring(NamedTuple):
    """The held inputs of B sequences; `read` names the slots of the states and of the rings.

    pool: [slots, R, row] in the inputs' dtype: the token at position i of a sequence has row i % R;
    past: int32 [B], tokens of each sequence before this step; held: int32 [B], how many of them the
    state in the slot lacks; fold: int32 [B], 0 to held: how many of these the stored state takes in
    during this step (0: it is not written).
    """

    pool: Tensor
    past: Tensor
    held: Tensor
    fold: Tensor


def ring_arguments(
    ring: Ring | None, state: Tensor, write: Tensor | None, each: bool, tokens: int, row: int,
    **inputs: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """What a step kernel takes for its ring, by name; None: it has none.

    row: elements of one token's inputs, all of which have the ring's dtype.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    if ring is None:
        if write is None:
            raise ValueError("write is None; without a ring it needs a slot for each token")
        return _NO_RING
    if write is not None or each:
        given = "each=True" if each else f"write={form(write)}"  # type: ignore[arg-type]
        raise ValueError(f"{given} is given with a ring, which stores no state after a new token")
    pool = ring.pool
    fits = pool.dim() == 3 and pool.shape[0] == state.shape[0] and pool.shape[2] == row
    require(fits and pool.shape[1] >= tokens, "ring.pool", form(pool),
            "must be [{}, R >= {}, {}]", state.shape[0], tokens, row)  # fmt: skip
    dense = pool[0].is_contiguous() and pool.stride(0) >= pool[0].numel()
    require(dense and pool.device == state.device, "ring.pool", form(pool),
            "must have contiguous slots on {}", state.device)  # fmt: skip
    for name, tensor in inputs.items():
        require(tensor.dtype == pool.dtype, name, form(tensor),
                "must have the ring's dtype, {}", pool.dtype)  # fmt: skip
    batch = next(iter(inputs.values())).shape[0]
    books = {"past": ring.past, "held": ring.held, "fold": ring.fold}
    require_slots(state, (batch,), **{f"ring.{name}": t for name, t in books.items()})
    return {
        "ring": pool, "ring_past": ring.past, "held": ring.held, "fold": ring.fold,
        "ring_slot": pool.stride(0), "R": pool.shape[1], "ROW": row,
    }  # fmt: skip


_NO_RING: dict[str, Any] = dict.fromkeys(
    ("ring", "ring_past", "held", "fold", "ring_slot", "R", "ROW")
)
