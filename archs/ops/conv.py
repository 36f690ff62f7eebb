"""The short causal convolution of a mixer with its tail in the state, by backend."""

from torch import Tensor

from archs.backends import everywhere
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState
from kernels.conv.torch import causal_conv, conv_tail, conv_tails


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
    return _CONVOLVE[backend](x, weight, bias, state, name, silu)


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
    from kernels.conv import chunk as conv_chunk
    from kernels.conv import step as conv_step

    if state is None:
        return conv_chunk.causal_conv(x, weight, bias, silu=silu)
    at = state.slots(name)
    if x.shape[1] <= RECURRENT_LIMIT:
        y = conv_step.conv_step(
            x, weight, bias, at.pool, at.read, at.write, silu=silu, each=at.each, new=at.new
        )
    else:
        y = conv_chunk.causal_conv(
            x, weight, bias, at.pool, silu=silu, new=at.new, tail_slots=at.read
        )
        conv_chunk.conv_tail_(x, at.pool, at.read, at.last, new=at.new)
    return y


_CONVOLVE = everywhere("short convolution", _torch, _triton)
