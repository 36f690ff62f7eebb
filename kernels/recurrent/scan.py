"""What the chunked scans with a matrix for each head share: sizes, checks of their arguments.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.recurrent.step import row_stride


@dataclass(frozen=True, slots=True)
class ScanSizes:
    """Every size of one call; chunk: tokens that are taken at once."""

    batch: int
    tokens: int
    groups: int
    heads: int
    n: int
    p: int
    chunk: int

    @classmethod
    def of(cls, q: Tensor, v: Tensor, chunk: int, *more: object) -> Self:
        """Of q [B, T, G, N] and v [B, T, H, P]; more: fields of a class below this one."""
        batch, tokens, groups, n = q.shape
        return cls(batch, tokens, groups, v.shape[2], n, v.shape[3], chunk, *more)

    @property
    def chunks(self) -> int:
        """How many chunks the tokens fill."""
        return -(-self.tokens // self.chunk)

    @property
    def share(self) -> int:
        """Heads of v per group of q and k."""
        return self.heads // self.groups

    def sum_heads(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, N] -> [B, T, G, N], in dtype."""
        if self.share == 1:
            return grad
        return grad.unflatten(2, (self.groups, self.share)).sum(3).to(dtype)


def check_scan(
    kernel: object, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, new: Tensor | None,
    dtypes: Container[torch.dtype], most: tuple[int, int], **gates: Tensor,
) -> None:  # fmt: skip
    """Every rule but the gates' own shapes and types.

    q, k: [B, T, G, N]; v: [B, T, H, P]; state: [B, H, N, P]; new: [B]; most: of N and P.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_gpu("q", q, kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, T, G, N]")
    require(v.dim() == 4, "v", form(v), "must be [B, T, H, P]")
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[2:]
    require(min(batch, tokens) >= 1, "q", form(q), "must have B >= 1 and T >= 1")
    require(k.shape == q.shape, "k", form(k), "must have q's shape, {}", list(q.shape))
    require(v.shape[:2] == q.shape[:2], "v", form(v), "must be [{}, {}, H, P]", batch, tokens)
    require(groups > 0 and heads > 0 and heads % groups == 0, "v", form(v),
             "must have heads divisible by the {} groups of q and k", groups)  # fmt: skip
    for name, channels, bound in (("N", n, most[0]), ("P", p, most[1])):
        require(channels % 16 == 0 and 16 <= channels <= bound, name, channels,
                 "must be a multiple of 16 up to {}", bound)  # fmt: skip
    require(q.dtype in dtypes, "q", form(q), "must be float32, bfloat16 or float16")
    for name, tensor in (("k", k), ("v", v)):
        require(tensor.dtype == q.dtype, name, form(tensor), "must have q's dtype, {}", q.dtype)
    for name, given, shape, dtype in (
        ("state", state, (batch, heads, n, p), torch.float32),
        ("new", new, (batch,), torch.int32),
    ):
        if given is not None:
            fits = given.shape == shape and given.dtype == dtype and given.is_contiguous()
            require(fits, name, form(given), "must be contiguous {} {}", dtype, list(shape))
            gates |= {name: given}
    for name, tensor in {"k": k, "v": v, **gates}.items():
        here = tensor.device == q.device
        require(here, name, form(tensor), "must be on the device of q, {}", q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        row_stride(name, tensor)
