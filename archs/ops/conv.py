"""The short causal convolution of a mixer with its tail in the state, by backend."""

from typing import cast

from torch import Tensor

from archs.backends import choose, everywhere
from archs.recurrent import RECURRENT_LIMIT
from archs.spec import KernelState, LayerState
from kernels.causal_conv import causal_conv, conv_tail, conv_tails


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: LayerState | None = None,
    name: str = "conv",
    silu: bool = True,
    backend: str,
) -> Tensor:
    """Convolve x [B, K, C] by weight [C, W] after the tail that `state` holds as `name`.

    Returns [B, K, C] and advances the tail; without a state the past is zero (training).
    """
    form = choose("short convolution", backend, _CONVOLVE)
    return form(x, weight, bias, state, name, silu)


def _torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState | None, name: str, silu: bool
) -> Tensor:
    if state is None:
        return causal_conv(x, weight, bias, silu=silu)
    width, tail = weight.shape[1], state.get(name)
    y = causal_conv(x, weight, bias, tail, silu=silu)
    each = conv_tails(x, tail, width) if state.each else None
    state.put(name, conv_tail(x, tail, width, new=state.new), each)
    return y


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: LayerState | None, name: str, silu: bool
) -> Tensor:
    from kernels import conv_chunk, conv_step

    if state is None:
        return conv_chunk.causal_conv(x, weight, bias, silu=silu)
    state = cast(KernelState, state)
    at = state.slots(name)
    if x.shape[1] <= RECURRENT_LIMIT:
        y = conv_step.conv_step(
            x, weight, bias, at.pool, at.slots, silu=silu, new=at.new, each=at.each
        )
    else:
        y = conv_chunk.causal_conv(
            x, weight, bias, at.pool, silu=silu, new=at.new, tail_slots=at.slots
        )
        conv_chunk.conv_tail_(x, at.pool, at.slots, new=at.new)
    state.settle(name, at)
    return y


_CONVOLVE = everywhere(_torch, _triton)
