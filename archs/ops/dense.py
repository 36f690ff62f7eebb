"""Norms, gates, and products of activations with weights, by backend.

Matrices belong to the libraries: cuBLAS has nothing to learn from us. A single row is no matrix,
and up to 16 rows are hardly one; where nothing is to be differentiated, they go to our own kernels,
one row with the norm before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import everywhere
from archs.ops.matrix import Matrix, Weight
from kernels.norm import torch as norm
from kernels.norm.torch import OutputNorm


@dataclass
class Unnormed:
    """A block's input before its norm, for the one product that reads it: RMSNorm of x + residual.

    x, residual: [..., D], residual None for x alone; weight: [D], of the norm. total: the sum,
    which the product leaves here.
    """

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    eps: float
    total: Tensor | None = None

    def read(self) -> Tensor:
        """x + residual, once a product has read it. Raises ValueError before."""
        if self.total is None:
            raise ValueError("the sum exists once a product, or `normed`, has read its input")
        return self.total

    @property
    def shape(self) -> torch.Size:
        """That of the input."""
        return self.x.shape

    def normed(self, *, backend: str) -> Tensor:
        """The norm itself, where no product takes it in."""
        if self.residual is None:
            self.total = self.x
            return rms_norm(self.x, self.weight, self.eps, backend=backend)
        y, self.total = add_rms_norm(self.x, self.residual, self.weight, self.eps, backend=backend)
        return y


#: Rows up to which a product is our own: as `products.few_rows.ROWS`, which takes Triton to read.
MOST_ROWS = 16
#: What a projection reads.
Input = Tensor | Unnormed


def product(x: Input, weight: Weight, *, backend: str) -> Tensor:
    """x Wᵀ. [..., D] with [N, D] -> [..., N]. An `Unnormed` x is normed on the way."""
    if isinstance(weight, Matrix):
        normed = x.normed(backend=backend) if isinstance(x, Unnormed) else x
        return weight.product(normed, backend=backend)
    if isinstance(x, Unnormed):
        return _NORM_PRODUCT[backend](x, weight)
    return _PRODUCT[backend](x, weight)


def by_head(x: Tensor, *weights: Tensor, backend: str) -> Tensor:
    """Each head's own product: [B, K, H, D] with [H, D, N] -> [B, K, H, N].

    weights: one of all heads, or several [h, D, N] whose heads follow one another. One matrix
    product a head, all tokens of the batch as its rows; a single token goes to our own kernel.
    """
    return _BY_HEAD[backend](x, weights)


def norm_swiglu(x: Unnormed, weight: Weight, *, backend: str) -> Tensor:
    """SwiGLU of norm(x) Wᵀ, the way into a gated MLP.

    weight: [2F, D], the gate first. Returns [..., F].
    """
    if isinstance(weight, Matrix):
        return swiglu(product(x, weight, backend=backend), backend=backend)
    return _NORM_SWIGLU[backend](x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _product_triton(x: Tensor, weight: Tensor) -> Tensor:
    if x.numel() > MOST_ROWS * x.shape[-1] or torch.is_grad_enabled():
        return F.linear(x, weight)
    from kernels.products import few_rows, gemv

    if gemv.serves(x, weight):
        return gemv.gemv(x, weight)
    return few_rows.few_rows(x, weight) if few_rows.serves(x, weight) else F.linear(x, weight)


def _by_head_torch(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    parts = x.flatten(0, 1).transpose(0, 1).split([len(weight) for weight in weights])
    found = [(part @ w).transpose(0, 1) for part, w in zip(parts, weights, strict=True)]
    together = found[0] if len(found) == 1 else torch.cat(found, 1)
    return together.unflatten(0, x.shape[:2])


def _by_head_triton(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    if torch.is_grad_enabled():
        return _by_head_torch(x, weights)
    from kernels.products import head_gemv

    # Products write tokens first, as the next one reads them, and each into its heads.
    found = x.new_empty(*x.shape[:3], weights[0].shape[-1])
    heads = [len(weight) for weight in weights]
    for part, weight, out in zip(x.split(heads, 2), weights, found.split(heads, 2), strict=True):
        if head_gemv.serves(part, weight):
            head_gemv.head_gemv(part, weight, out=out)
        else:
            rows = out.flatten(0, 1).transpose(0, 1)
            torch.bmm(part.flatten(0, 1).transpose(0, 1), weight, out=rows)
    return found


def _norm_product(x: Unnormed, weight: Tensor) -> Tensor:
    return _product(x.normed(backend="torch"), weight)


def _norm_product_triton(x: Unnormed, weight: Tensor) -> Tensor:
    found = _one_row(x, weight, gated=False)
    return _product_triton(x.normed(backend="triton"), weight) if found is None else found


def _norm_swiglu(x: Unnormed, weight: Tensor) -> Tensor:
    return swiglu(_norm_product(x, weight), backend="torch")


def _norm_swiglu_triton(x: Unnormed, weight: Tensor) -> Tensor:
    found = _one_row(x, weight, gated=True)
    if found is not None:
        return found
    normed = x.normed(backend="triton")
    if normed.numel() <= MOST_ROWS * normed.shape[-1] and not torch.is_grad_enabled():
        from kernels.products.few_rows import few_rows, serves

        if serves(normed, weight):
            return few_rows(normed, weight, gated=True)
    return swiglu(_product_triton(normed, weight), backend="triton")


def _one_row(x: Unnormed, weight: Tensor, *, gated: bool) -> Tensor | None:
    """Norm, product and gate in one launch; None where that takes other operands."""
    if x.x.numel() != x.shape[-1] or torch.is_grad_enabled():
        return None
    from kernels.products.gemv import norm_gemv, norm_serves

    if not norm_serves(x.x, x.residual, x.weight, weight):
        return None
    y, x.total = norm_gemv(x.x, x.residual, x.weight, weight, eps=x.eps, gated=gated)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str) -> Tensor:
    """As `kernels.norm.torch.rms_norm`."""
    return _RMS_NORM[backend](x, weight, eps)


def norm_each(x: Tensor, weight: Tensor, eps: float, *, backend: str) -> Tensor:
    """Each of G vectors normed by a weight of its own: [..., G, D] with [G, D] -> [..., G, D]."""
    parts = zip(x.unbind(-2), weight, strict=True)
    return torch.stack([rms_norm(part, w, eps, backend=backend) for part, w in parts], -2)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and the sum. [..., D] -> [..., D] twice."""
    return _ADD_RMS_NORM[backend](x, residual, weight, eps)


def output_norm(y: Tensor, how: OutputNorm, *, backend: str) -> Tensor:
    """Norm and gate a mixer's output y [B, K, H, P] in a launch of its own. -> [B, K, H·P]."""
    return _GATED_RMS_NORM[backend](
        y.reshape(how.gate.shape), how.gate, how.weight, how.eps, gate_first=how.gate_first,
        group=how.group, opened=how.opened,
    ).flatten(2)  # fmt: skip


def swiglu(gate_up: Tensor, *, backend: str) -> Tensor:
    """silu(first half) · second half. [..., 2F] -> [..., F]."""
    return _SWIGLU[backend](gate_up)


def _add_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm.rms_norm(total, weight, eps), total


def _norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from kernels.norm import rows as norm_triton

    return norm_triton.rms_norm(x, weight, eps)


def _add_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from kernels.norm import rows as norm_triton

    # Under autocast the stream stays as wide as torch's promotion would leave it.
    return norm_triton.add_rms_norm(x.to(residual.dtype), residual, weight, eps)


def _gated_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float, **options: Any) -> Tensor:
    from kernels.norm import rows as norm_triton

    return norm_triton.gated_rms_norm(x, gate, weight, eps, **options)


def _swiglu_triton(gate_up: Tensor) -> Tensor:
    from kernels.norm import rows as norm_triton

    return norm_triton.swiglu(gate_up)


_RMS_NORM = everywhere("RMSNorm", norm.rms_norm, _norm_triton)
_ADD_RMS_NORM = everywhere("RMSNorm", _add_torch, _add_triton)
_GATED_RMS_NORM = everywhere("gated RMSNorm", norm.gated_rms_norm, _gated_triton)
_SWIGLU = everywhere("SwiGLU", norm.swiglu, _swiglu_triton)
_NORM_PRODUCT = everywhere("product", _norm_product, _norm_product_triton)
_NORM_SWIGLU = everywhere("product", _norm_swiglu, _norm_swiglu_triton)
_BY_HEAD = everywhere("product", _by_head_torch, _by_head_triton)
_PRODUCT = everywhere("product", _product, _product_triton)
