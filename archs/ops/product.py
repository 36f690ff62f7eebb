"""Products of activations with weights, by backend.

Matrices belong to the libraries: cuBLAS has nothing to learn from us. A single row is no matrix;
where nothing is to be differentiated, it goes to our own kernel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import choose, everywhere
from archs.ops import glue


def product(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    """x Wᵀ. [..., D] with [N, D] -> [..., N]."""
    return choose("product", backend, _PRODUCT)(x, weight)


def by_head(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    """Each head's own product: [B, K, H, D] with [H, D, N] -> [B, K, H, N].

    One matrix product a head, all tokens of the batch as its rows.
    """
    return choose("product", backend, _BY_HEAD)(x, weight)


def norm_swiglu(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor,
    *, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """SwiGLU of W norm(x + residual), and the sum: the way into a gated MLP.

    x, residual: [..., D] (None: x alone); norm_weight: [D]; weight: [2F, D], the gate first.
    Returns [..., F] and [..., D].
    """
    chosen = choose("product", backend, _NORM_SWIGLU)
    return chosen(x, residual, norm_weight, eps, weight)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _triton(x: Tensor, weight: Tensor) -> Tensor:
    if x.numel() != x.shape[-1] or torch.is_grad_enabled():
        return F.linear(x, weight)
    from kernels.gemv import gemv, serves

    return gemv(x, weight) if serves(x, weight) else F.linear(x, weight)


def _by_head_torch(x: Tensor, weight: Tensor) -> Tensor:
    found = x.flatten(0, 1).transpose(0, 1) @ weight
    return found.transpose(0, 1).unflatten(0, x.shape[:2])


def _by_head_triton(x: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _by_head_torch(x, weight)
    # The product writes tokens first, as the next one reads them.
    found = x.new_empty(*x.shape[:3], weight.shape[-1])
    rows = found.flatten(0, 1).transpose(0, 1)
    torch.bmm(x.flatten(0, 1).transpose(0, 1), weight, out=rows)
    return found


def _norm_swiglu(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor,
    *, backend: str = "torch",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if residual is None:
        normed, total = glue.rms_norm(x, norm_weight, eps, backend=backend), x
    else:
        normed, total = glue.add_rms_norm(x, residual, norm_weight, eps, backend=backend)
    return glue.swiglu(product(normed, weight, backend=backend), backend=backend), total


def _norm_swiglu_triton(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    if x.numel() == x.shape[-1] and not torch.is_grad_enabled():
        from kernels.gemv import norm_gemv, norm_serves

        if norm_serves(x, residual, norm_weight, weight):
            return norm_gemv(x, residual, norm_weight, eps, weight, gated=True)
    return _norm_swiglu(x, residual, norm_weight, eps, weight, backend="triton")


_NORM_SWIGLU = everywhere(_norm_swiglu, _norm_swiglu_triton)
_BY_HEAD = everywhere(_by_head_torch, _by_head_triton)
_PRODUCT = everywhere(_torch, _triton)
