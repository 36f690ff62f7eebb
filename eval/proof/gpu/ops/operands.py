"""Operands of the cases: random values on the device, pages shuffled as in a used store."""

from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = 64


def random(
    *shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0
) -> Tensor:
    """Normal values of standard deviation `scale`."""
    return torch.randn(shape, device=device).mul_(scale).to(dtype)


def paged(
    lengths: Sequence[int], device: torch.device, page: int = PAGE
) -> tuple[Tensor, Tensor, int]:
    """A shuffled block table int32 [B, max_pages], lengths int32 [B], and the pool's pages."""
    batch, most = len(lengths), -(-max(lengths) // page)
    table = torch.randperm(batch * most, device=device).view(batch, most).int()
    return table, torch.tensor(lengths, dtype=torch.int32, device=device), batch * most


def dense(pool: Tensor, table: Tensor, rows: int, page: int = PAGE) -> Tensor:
    """The first `rows` rows of each sequence, out of [G, ·, d]: contiguous [B, G, rows, d]."""
    at = table.long()[:, :, None] * page + torch.arange(page, device=table.device)
    return pool[:, at.flatten(1)[:, :rows]].transpose(0, 1).contiguous()


def angles(positions: int, dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of random angles, [positions, dim / 2, 2]."""
    turn = torch.rand(positions, dim // 2, device=device) * 6.28
    return torch.stack((turn.cos(), turn.sin()), -1).contiguous()


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of tensors, also of those on the device meta."""
    return sum(t.nbytes for t in tensors)


def slots(batch: int, device: torch.device) -> Tensor:
    """Slots 0..batch-1, int32."""
    return torch.arange(batch, dtype=torch.int32, device=device)


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    """Copies for an oracle that runs on the CPU."""
    return [t.detach().cpu() for t in tensors]


def binary(count: int) -> str:
    """16384 as 16k."""
    return f"{count // 1024}k" if count % 1024 == 0 and count else str(count)
