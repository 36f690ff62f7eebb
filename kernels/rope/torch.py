"""Rotary positions (arXiv 2104.09864) on interleaved pairs, as complex multiplication.

Channels (0, 1), (2, 3), … rotate together, as in DeepSeek and GPT-J. Llama's half-split layout is
the same rotation after permuting each head's channels (`half_to_interleaved`), so weights convert
exactly. Angles and products are float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_TABLES: dict[tuple[int, float, int, torch.device], Tensor] = {}


def rope_table(
    positions_upto: int, dim: int, theta: float, device: torch.device, turned: int | None = None
) -> Tensor:
    """Unit complex numbers e^{i·p·theta^(-2j/r)}, complex64 [>= positions_upto, 1, dim/2].

    turned: r, the channels that rotate, the first of `dim` (None: all). The angles of the others
    are 0, so that whatever takes a table rotates a part of a head too, and the rest exactly not.
    Kept per (dim, theta, turned, device) and grown by doubling. Raises ValueError when dim or
    turned is odd, and when turned is not among 0..dim.
    """
    turned = dim if turned is None else turned
    if dim % 2 or turned % 2:
        raise ValueError(f"dim={dim} or turned={turned} is odd; rotary pairs need even ones")
    if not 0 <= turned <= dim:
        raise ValueError(f"turned={turned} must be one of 0..{dim}")
    key = (dim, theta, turned, torch.device(device))
    table = _TABLES.get(key)
    if table is None or table.shape[0] < positions_upto:
        size = max(256, 1 << (positions_upto - 1).bit_length())
        # A normal tensor even when first asked for under inference mode: training reuses it.
        with torch.inference_mode(False), torch.no_grad():
            pairs = torch.arange(0, turned, 2, dtype=torch.float64)
            frequency = F.pad(theta ** (-pairs / turned), (0, (dim - turned) // 2))
            angle = torch.outer(torch.arange(size, dtype=torch.float64), frequency)
            table = (
                torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None].to(device)
            )
        _TABLES[key] = table
    return table


def _pairs(x: Tensor) -> Tensor | None:
    """x [..., d] seen as complex [..., d/2]; None where odd strides or offsets forbid the view."""
    *others, last = x.stride()
    if last != 1 or x.storage_offset() % 2 or any(stride % 2 for stride in others):
        return None
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [B, T, H, d] by angles [T, 1, d/2] or [1 or B, T, 1, d/2]; differentiable."""
    wide = x.float()
    pairs = _pairs(wide)
    if pairs is None:
        # `contiguous` would keep a slice that starts at an odd offset.
        copy = wide.clone(memory_format=torch.contiguous_format)
        pairs = torch.view_as_complex(copy.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


def apply_rope_(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [B, T, H, d] in place (it may be a slice); returns x."""
    pairs = _pairs(x) if x.dtype == torch.float32 else None
    if pairs is not None:
        pairs.mul_(angles)
        return x
    return x.copy_(apply_rope(x, angles))


def _rotate_real(x: Tensor, angles: Tensor) -> Tensor:
    """`apply_rope` by (cos, sin) [..., d/2, 2]: torch's compiler cannot fuse complex numbers."""
    cos, sin = angles.unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [..., d] into a new tensor; angles as in `rotate`, broadcast to [..., d/2]."""
    return apply_rope(x, angles) if angles.is_complex() else _rotate_real(x, angles).to(x.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate x [B, T, H, d]: in place where no gradient needs it, else into a new tensor.

    angles: complex as in `apply_rope`, or the same numbers as reals [..., d/2, 2].
    """
    if not angles.is_complex():
        return x.copy_(_rotate_real(x, angles))
    return (apply_rope if x.requires_grad else apply_rope_)(x, angles)


def rotate_last(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the last channels of x [B, T, H, d], as many as `angles` are for, as `rotate` does."""
    dim = 2 * angles.shape[-1 if angles.is_complex() else -2]
    turned = rotate(x[..., -dim:], angles)
    return torch.cat((x[..., :-dim], turned), -1) if x.requires_grad else x


def turned_back(angles: Tensor) -> Tensor:
    """The angles of the inverse rotation."""
    return angles.conj() if angles.is_complex() else angles * angles.new_tensor([1.0, -1.0])


def earlier(angles: Tensor, by: int, theta: float) -> Tensor:
    """The angles of positions that lie `by` before those of `angles` [..., d/2]."""
    if angles.is_complex():
        return angles * rope_table(by + 1, 2 * angles.shape[-1], theta, angles.device)[by].conj()
    # Code that is compiled looks nothing up.
    pairs = angles.shape[-2]
    steps = torch.arange(pairs, dtype=torch.float64, device=angles.device) / pairs
    back = by * theta**-steps
    (cos, sin), (even, odd) = (back.cos().float(), back.sin().float()), angles.unbind(-1)
    return torch.stack((even * cos + odd * sin, odd * cos - even * sin), -1)


def half_to_interleaved(dim: int) -> Tensor:
    """Channel order p of one head, int64 [dim], with w_interleaved = w_half[p]."""
    half = torch.arange(dim // 2)
    return torch.stack((half, half + dim // 2), 1).flatten()
