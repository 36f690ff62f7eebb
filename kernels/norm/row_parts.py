"""What the norm kernels share: checks before any launch and where rows lie."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
from torch import Tensor

from kernels.checks import form, require
from kernels.device import require_gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 16384


def check_rows(kernel: object, **tensors: Tensor) -> None:
    """Every tensor must be [..., D] like the first, floating, rows dense, where `kernel` runs."""
    first = next(iter(tensors.values()))
    for name, t in tensors.items():
        shown = form(t)
        require_gpu(name, t, kernel)
        require(t.device == first.device, name, shown, "must be on {}", first.device)
        require(t.dtype in DTYPES, name, shown, "must be one of {}", DTYPES)
        require(t.shape == first.shape, name, shown, "must have shape {}", list(first.shape))
        require(t.dim() > 0 and t.numel() > 0, name, shown, "must be [..., D], not empty")
        require(t.numel() < 2**31 * t.shape[-1], name, shown, "must have fewer than 2^31 rows")
        dense = t.stride(-1) == 1 or t.shape[-1] == 1
        require(dense, name, shown, "must have a last stride of 1")


def check_weight(weight: Tensor, x: Tensor, group: int) -> None:
    """weight must be [D] for the last dimension of x, which its groups divide."""
    dim, shown = x.shape[-1], form(weight)
    require(group > 0 and dim % group == 0, "group", group, "must divide D={}", dim)
    require(x.numel() < group * 2**30, "x", form(x), "must have fewer than 2^30 rows (or groups)")
    require(group <= MAX_DIM, "D", group, "(or its group) must be at most {}", MAX_DIM)
    fits = weight.shape == (dim,) and weight.is_contiguous() and weight.dtype in DTYPES
    require(fits, "weight", shown, "must be contiguous [{}], one of {}", dim, DTYPES)
    require(weight.device == x.device, "weight", shown, "must be on {}", x.device)


def row_strides(groups: int = 1, **tensors: Tensor | None) -> tuple[int, list[int]]:
    """(inner, [outer stride, inner stride of each tensor]) of rows that are groups of [..., D].

    Row r of each tensor starts at r // inner · outer stride + r % inner · inner stride; a tensor
    that is None has zeros. Raises ValueError where one such inner does not fit them all.
    """
    views = {
        name: t if groups == 1 else t.unflatten(-1, (groups, -1))
        for name, t in tensors.items()
        if t is not None
    }
    lead = next(iter(views.values())).shape[:-1]
    for split in range(len(lead), -1, -1):
        spaced = {
            name: (_spacing(lead[:split], t.stride()), _spacing(lead[split:], t.stride()[split:]))
            for name, t in views.items()
        }
        if all(None not in pair for pair in spaced.values()):
            flat = [n or 0 for name in tensors for n in spaced.get(name, (0, 0))]
            return lead[split:].numel(), flat
    shown = ", ".join(f"{name}={form(t)}" for name, t in tensors.items() if t is not None)
    raise ValueError(f"{shown} must have rows that are evenly spaced in two levels at most")


def _spacing(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of these dimensions as one; None where it varies."""
    kept = [(n, s) for n, s in zip(shape, strides, strict=False) if n > 1]
    for (_, outer), (size, stride) in pairwise(kept):
        if outer != size * stride:
            return None
    return kept[-1][1] if kept else 0


def block_of(size: int) -> int:
    """BLOCK_D that holds a row of that many channels."""
    return max(16, triton.next_power_of_2(size))
