"""Numbers of a few bits: packing, rounding to nearest, and what the numbers stand for.

A matrix [N, K] is stored by rows. Integers of b < 8 bits are asymmetric, (code - 2^(b-1)) · scale +
zero with a scale and a zero point for each run of `group` columns; eight codes lie in b bytes, the
first in the lowest bits (of four bits: two to a byte, the lower one first). A last run that K cuts
short is filled up with its last number: K' columns are stored. Eight bits are symmetric, code ·
scale, and take an element each, as int8 or float8; their group is a row. Scales and zero points
are bfloat16, and codes are chosen for the rounded ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

#: Bits of integers that share bytes.
NARROW = (2, 3, 4)
#: Codes that are packed together.
RUN = 8
#: Of scales and zero points.
SCALE_DTYPE = torch.bfloat16


class Rounded(NamedTuple):
    """A matrix as codes: [N, K'·b/8] uint8, or [N, K] int8 or float8; scales, and zero points of
    narrow integers, [N, K' / group].
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes 0 to 2^bits - 1, [..., K] of any integers with K a multiple of 8 -> uint8 [..., K·b/8].

    Raises ValueError on K or bits that do not fit.
    """
    _require_narrow(bits)
    if codes.shape[-1] % RUN:
        raise ValueError(f"codes of {codes.shape[-1]} columns must come in multiples of {RUN}")
    shifts = torch.arange(RUN, device=codes.device) * bits
    words = (codes.long().unflatten(-1, (-1, RUN)) << shifts).sum(-1)
    bytes_at = torch.arange(bits, device=codes.device) * 8
    return (words[..., None] >> bytes_at & 0xFF).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What `pack` packed: uint8 [..., K·b/8] -> uint8 [..., K]."""
    _require_narrow(bits)
    if RUN % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return (packed[..., None] >> shifts & (2**bits - 1)).flatten(-2)
    bytes_at = torch.arange(bits, device=packed.device) * 8
    words = (packed.long().unflatten(-1, (-1, bits)) << bytes_at).sum(-1)
    shifts = torch.arange(RUN, device=packed.device) * bits
    return (words[..., None] >> shifts & (2**bits - 1)).to(torch.uint8).flatten(-2)


def _require_narrow(bits: int) -> None:
    if bits not in NARROW:
        raise ValueError(f"bits={bits} must be one of {', '.join(map(str, NARROW))}")


def grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of runs of numbers [..., group] -> bfloat16 [...] each.

    The ends of the range are the least and the greatest number; a run of equal numbers has scale 0
    and is its zero point.
    """
    low, high = weight.aminmax(dim=-1)
    scale = ((high - low) / (2**bits - 1)).to(SCALE_DTYPE)
    zero = (low + scale.to(weight.dtype) * 2 ** (bits - 1)).to(SCALE_DTYPE)
    return scale, zero


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes 0 to 2^bits - 1 that come nearest, in the weight's dtype.

    weight: [..., group]; scale, zero: [...].
    """
    wide, offset = scale.to(weight.dtype)[..., None], zero.to(weight.dtype)[..., None]
    half = 2 ** (bits - 1)
    steps = torch.where(wide == 0, 0, (weight - offset) / wide)
    return steps.round().add(half).clamp(0, 2**bits - 1)


def round_narrow(weight: Tensor, bits: int, group: int) -> Rounded:
    """A matrix [N, K] as integers of 2, 3 or 4 bits, rounded to nearest.

    Raises ValueError where `group` is no multiple of 8.
    """
    return round_on(weight, *grid(in_runs(weight, group), bits), bits, group)


def round_on(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int) -> Rounded:
    """As `round_narrow`, on given scales and zero points [N, K' / group]."""
    codes = nearest(in_runs(weight, group), scale, zero, bits)
    return Rounded(pack(codes.flatten(-2), bits), scale, zero)


def in_runs(weight: Tensor, group: int) -> Tensor:
    """[..., K] -> [..., K' / group, group], the last run filled up with its last number.

    Raises ValueError where `group` is no multiple of 8.
    """
    if group < RUN or group % RUN:
        raise ValueError(f"group={group} must be a multiple of {RUN}")
    short = -weight.shape[-1] % group
    if short:
        weight = torch.cat((weight, weight[..., -1:].expand(*weight.shape[:-1], short)), -1)
    return weight.unflatten(-1, (-1, group))


def round_int8(weight: Tensor) -> Rounded:
    """A matrix [N, K] as int8 with a scale for each row, symmetric, rounded to nearest."""
    scale = _row_scale(weight, 127)
    wide = scale.to(weight.dtype)
    codes = torch.where(wide == 0, 0, weight / wide).round().clamp(-127, 127)
    return Rounded(codes.to(torch.int8), scale, None)


def round_fp8(weight: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Rounded:
    """A matrix [N, K] as float8 with a scale for each row, whose largest number is the greatest."""
    most = torch.finfo(dtype).max
    scale = _row_scale(weight, most)
    wide = scale.to(weight.dtype)
    codes = torch.where(wide == 0, 0, weight / wide).clamp(-most, most)
    return Rounded(codes.to(dtype), scale, None)


def _row_scale(weight: Tensor, most: float) -> Tensor:
    """[N, K] -> [N, 1]: the step that puts a row's largest magnitude at `most`."""
    return (weight.abs().amax(-1, keepdim=True) / most).to(SCALE_DTYPE)


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [M, K] as int8, each by a scale of its own, float32 [M, 1] (float64 of such rows)."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale == 0, 0, wide / scale).round()
    return codes.to(torch.int8), scale


def on_grid(weight: Tensor, bits: int, group: int) -> Tensor:
    """What `round_narrow` makes of a matrix [N, K], as numbers of its dtype; nothing is packed."""
    runs = in_runs(weight, group)
    scale, zero = grid(runs, bits)
    steps = nearest(runs, scale, zero, bits).sub_(2 ** (bits - 1))
    found = steps.mul_(scale.to(weight.dtype)[..., None]).add_(zero.to(weight.dtype)[..., None])
    return found.flatten(-2)[..., : weight.shape[-1]]


def dense(rounded: Rounded, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, [N, K] of K `columns`, in `dtype` and computed there.

    bits: of narrow integers; 8: an element each.
    """
    codes, scale, zero = rounded
    if zero is None:
        return codes.to(dtype) * scale.to(dtype)
    steps = unpack(codes, bits).to(dtype).sub_(2 ** (bits - 1))
    runs = steps.unflatten(-1, (scale.shape[-1], -1))
    runs.mul_(scale.to(dtype)[..., None]).add_(zero.to(dtype)[..., None])
    return runs.flatten(-2)[..., :columns]


def product_ref(x: Tensor, rounded: Rounded, bits: int) -> Tensor:
    """The oracle: x Wᵀ in float64, [..., K] -> [..., N]."""
    return x.double() @ dense(rounded, bits, x.shape[-1], torch.float64).t()
