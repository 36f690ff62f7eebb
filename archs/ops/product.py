"""Products of activations with weights, by backend.

Matrices belong to the libraries: cuBLAS has nothing to learn from us. A single row is no matrix;
where nothing is to be differentiated, it goes to our own kernel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import choose, everywhere


def product(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    """x Wᵀ. [..., D] with [N, D] -> [..., N]."""
    return choose("product", backend, _PRODUCT)(x, weight)


def _torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _triton(x: Tensor, weight: Tensor) -> Tensor:
    if x.numel() != x.shape[-1] or torch.is_grad_enabled():
        return F.linear(x, weight)
    from kernels.gemv import gemv, serves

    return gemv(x, weight) if serves(x, weight) else F.linear(x, weight)


_PRODUCT = everywhere(_torch, _triton)
