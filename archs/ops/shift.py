"""Blends of tokens with the ones before them, by backend."""

import torch
from torch import Tensor

from archs.backends import Forms
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState
from kernels.conv.torch import conv_tail, conv_tails


def token_shift(
    x: Tensor, blend: Tensor, *, state: LayerState | None = None, name: str = "shift", backend: str
) -> Tensor:
    """y_i = x_t + (x_{t-1} - x_t) w_i for each blend w_i (RWKV's token shift).

    x: [B, K, D]; blend: [W, D]. Returns [W, B, K, D] and advances the state [1, D] called `name`;
    without one the first token follows zeros: training, which is torch's under every backend.
    Raises NoFormError for a backend that has no form of it.
    """
    if state is None:
        return blended(x, torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1), blend)
    return _FORMS[backend](x, blend, state, name)


def blended(x: Tensor, before: Tensor, blend: Tensor) -> Tensor:
    """The blends [W, B, K, D] of x with `before`, both [B, K, D]."""
    return torch.addcmul(x, before - x, blend.to(x.dtype)[:, None, None])


def _torch(x: Tensor, blend: Tensor, state: LayerState, name: str) -> Tensor:
    tail = state.get(name)
    before = torch.cat((tail.to(x.dtype), x[:, :-1]), 1)
    each = conv_tails(x, tail, 2) if state.each else None
    state.put(name, conv_tail(x, tail, 2, new=state.new), each)
    return blended(x, before, blend)


def _triton(x: Tensor, blend: Tensor, state: LayerState, name: str) -> Tensor:
    """Steps of more tokens are torch's."""
    from kernels.conv import shift

    if x.shape[1] > RECURRENT_LIMIT:
        return _torch(x, blend, state, name)
    at = state.slots(name)
    return shift.token_shift(x, blend, at.pool, at.read, at.write, each=at.each, new=at.new)


_FORMS = Forms("token shift", {"torch": _torch, "triton": _triton})
