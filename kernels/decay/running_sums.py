"""Decays between tokens of a chunk: e^{c_t - c_s} where c is the running sum of log decays g <= 0.

c_t and c_s can be long and their difference short: after one token with g = -30000 a float32 sum
no longer knows that its neighbours have g = -0.01. So sums are formed in float64 and kept as a
float32 and what its rounding left; differences of such pairs are as exact as float32 itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Decays of less are 0 in float64 too; a sum of them stays finite, whatever g was.
LEAST = tl.constexpr(-1000.0)


@triton.jit
def running_sums(g):  # type: ignore[no-untyped-def]
    """c of g [C], as two float32: its nearest value, and the rest."""
    total = tl.cumsum(tl.maximum(g, LEAST).to(tl.float64), 0)
    near = total.to(tl.float32)
    return near, (total - near.to(tl.float64)).to(tl.float32)


@triton.jit
def after(near, rest, later_near, later_rest):  # type: ignore[no-untyped-def]
    """c of later tokens [C], known from the first of them on: with what the earlier [C] came to."""
    end = tl.arange(0, near.shape[0]) == near.shape[0] - 1
    total = tl.sum(tl.where(end, near.to(tl.float64) + rest.to(tl.float64), 0.0), 0)
    total += later_near.to(tl.float64) + later_rest.to(tl.float64)
    near = total.to(tl.float32)
    return near, (total - near.to(tl.float64)).to(tl.float32)


@triton.jit
def gaps(near, rest):  # type: ignore[no-untyped-def]
    """c_row - c_column, [C, C]."""
    return (near[:, None] - near[None, :]) + (rest[:, None] - rest[None, :])


def chunk_decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of log decays [..., C], float32 or float64, in their dtype; differentiable.

    Returns between [..., C, C] (row t, column s: e^{c_t - c_s}, 0 where s > t), since [..., C]
    (e^{c_t}) and until [..., C] (e^{c_C - c_t}).
    """
    total = g.clamp(min=LEAST.value).double().cumsum(-1)
    near = total.to(g.dtype)
    rest = (total - near).detach().to(g.dtype)
    # Masked before exp, so that nothing positive is ever exponentiated.
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    between = near[..., :, None] - near[..., None, :]
    between += rest[..., :, None] - rest[..., None, :]
    until = near[..., -1:] - near + (rest[..., -1:] - rest)
    return between.masked_fill_(future, -torch.inf).exp_(), near.exp(), until.exp()
