"""Mamba-3's recurrence on a layer's state, by backend (arXiv 2603.15569)."""

from collections.abc import Callable

import torch
from torch import Tensor

from archs.backends import Forms
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState
from kernels.decay.torch import decay_chunk
from kernels.trapezoid.torch import (
    Tokens,
    TrapezoidSizes,
    TrapezoidWeights,
    before_of,
    finished,
    rows_of,
    tokens_of,
    trapezoid_chunk,
    trapezoid_step,
)

#: The state's tensors: the memory, the angles [H, A] where there are any, and what the next token
#: needs of the last one, its k and x.
MEMORY, ANGLE, LAST = "ssm", "angle", "last"


def trapezoid(
    inputs: Tensor,
    sizes: TrapezoidSizes,
    weights: TrapezoidWeights,
    *,
    state: LayerState | None = None,
    backend: str,
) -> Tensor:
    """The recurrence with its norms, rotation, skip and gate, as `kernels.trapezoid.torch` says.

    inputs: [B, K, sum(sizes.parts)], as projected. Returns [B, K, H·P] and advances the state;
    without one it starts at zero and is not kept (training).
    """
    return _TRAPEZOID[backend](inputs, sizes, weights, state)


def _torch(
    inputs: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights, state: LayerState | None
) -> Tensor:
    if state is None or inputs.shape[1] > RECURRENT_LIMIT:
        return _chunked(inputs, sizes, weights, state, decay_chunk)
    tokens = _tokens(inputs, sizes, weights, state)
    before = before_of(state.get(MEMORY), state.get(LAST), sizes, weights)
    y, each = trapezoid_step(tokens, before, each=state.each)
    state.put(MEMORY, before.state, each)
    _put_last(state, inputs, tokens, sizes)
    return finished(y, tokens.v, inputs[..., : sizes.inner], sizes, weights)


def _triton(
    inputs: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights, state: LayerState | None
) -> Tensor:
    from kernels.decay import chunk
    from kernels.trapezoid import step

    if state is None or inputs.shape[1] > RECURRENT_LIMIT:
        return _chunked(inputs, sizes, weights, state, chunk.decay_chunk)
    at, last = state.slots(MEMORY), state.slots(LAST).pool
    angle = state.slots(ANGLE).pool if sizes.angles else None
    return step.trapezoid_step(
        inputs, sizes, weights, last, angle, at.pool, at.read, at.write, each=at.each, new=at.new
    )


def _chunked(
    inputs: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights, state: LayerState | None,
    scan: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:  # fmt: skip
    tokens = _tokens(inputs, sizes, weights, state)
    if state is None:
        y, _ = trapezoid_chunk(tokens, scan=scan)
    else:
        before = before_of(state.get(MEMORY), state.get(LAST), sizes, weights)
        y, memory = trapezoid_chunk(tokens, before, scan=scan)
        state.put(MEMORY, memory)
        _put_last(state, inputs, tokens, sizes)
    return finished(y, tokens.v, inputs[..., : sizes.inner], sizes, weights)


def _tokens(
    inputs: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights, state: LayerState | None
) -> Tokens:
    if state is None:
        return tokens_of(inputs, sizes, weights)
    angle = state.get(ANGLE) if sizes.angles else None
    return tokens_of(inputs, sizes, weights, angle, state.valid)


def _put_last(state: LayerState, inputs: Tensor, tokens: Tokens, sizes: TrapezoidSizes) -> None:
    """Keep the angles and the k and x of each sequence's last valid token, or of all tokens."""
    if sizes.angles:
        state.put(ANGLE, tokens.angles[:, -1], tokens.angles if state.each else None)
    x, each = inputs[..., sizes.inner : 2 * sizes.inner], None
    if state.each:
        each = rows_of(tokens.k, x, sizes).unsqueeze(2)
    if state.new is None:
        row = rows_of(tokens.k[:, -1:], x[:, -1:], sizes)
    else:
        # Of a sequence without a valid token the store keeps what it has.
        sequence = torch.arange(len(x), device=x.device)
        at = sequence, (state.new - 1).clamp(min=0)
        row = rows_of(tokens.k[at].unsqueeze(1), x[at].unsqueeze(1), sizes)
    state.put(LAST, row, each)


_TRAPEZOID = Forms("the trapezoidal recurrence", {"torch": _torch, "triton": _triton})
