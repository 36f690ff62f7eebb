"""Runs of numbers as bytes: rows and values of a state, rounded where a store keeps them.

A run [..., N] becomes uint8 [..., bytes]: the codes, then a scale for every `group` numbers, then
zero points or residuals. Fewer than 8 bits are asymmetric as in `kernels.quant.torch`, whose scales
and zero points are bfloat16; 8 bits are symmetric with float32 scales, so that numbers that are
stored a second time are stored alike. A run of zeros has scale 0; what is no number stays none.

A residual is what rounding a number left, in 2^-bits of a step: whoever stores the next number adds
it first, so that errors of many roundings do not add up (error feedback).
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.quant.torch import RUN, SCALE_DTYPE, grid, nearest, pack, unpack

#: Scales of symmetric codes.
WIDE_SCALE = torch.float32
#: Largest code of int8.
MOST = 127


@dataclass(frozen=True, slots=True)
class Runs:
    """How a run of `numbers` numbers is laid out.

    bits: of a code; dtype: of codes of 8 bits, int8 or float8. group: numbers of a scale.
    residual_bits: of a residual; 0: none are kept.
    """

    numbers: int
    bits: int
    group: int
    dtype: torch.dtype = torch.int8
    residual_bits: int = 0

    @property
    def groups(self) -> int:
        """Scales of a run."""
        return ceil(self.numbers / self.group)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of scales."""
        return WIDE_SCALE if self.bits == 8 else SCALE_DTYPE

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of codes, of scales and zero points, and of residuals."""
        scale = self.scale_dtype.itemsize * (1 if self.bits == 8 else 2)
        codes, residuals = (ceil(self.numbers * b / 8) for b in (self.bits, self.residual_bits))
        return codes, self.groups * scale, residuals

    def encode(
        self, x: Tensor, residual: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """[..., N] -> uint8 [..., bytes].

        residual: [..., N], added first. noise: [..., N] from 0 up to 1, added to 8-bit codes
        before they are rounded down (stochastic rounding); None: to nearest.
        """
        x = x if residual is None else x + residual.to(x.dtype)
        # Shorter numbers would round the quotient once more before it is rounded to a code.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        short = self.groups * self.group - self.numbers
        # A last group that is short is filled up with its last number: its range stays the same.
        full = torch.cat((x, x[..., -1:].expand(*x.shape[:-1], short)), -1) if short else x
        runs = full.unflatten(-1, (self.groups, self.group))
        if self.bits < 8:
            scale, zero = grid(runs, self.bits)
            codes = nearest(runs, scale, zero, self.bits).flatten(-2)[..., : self.numbers]
            packed = self._packed(codes, self.bits)
            return torch.cat((packed, _bytes(scale), _bytes(zero)), -1)
        most = MOST if self.dtype == torch.int8 else torch.finfo(self.dtype).max
        scale = (runs.abs().amax(-1) / most).to(WIDE_SCALE)
        steps = torch.where(scale == 0, 1, scale).to(x.dtype)
        at = (runs / steps[..., None]).flatten(-2)[..., : self.numbers]
        if self.dtype == torch.int8:
            held = at.round() if noise is None else (at + noise.to(at.dtype)).floor()
            codes = held.clamp(-most, most).to(torch.int8)
        else:
            codes = at.clamp(-most, most).to(self.dtype)
        parts = [codes.view(torch.uint8), _bytes(scale)]
        if self.residual_bits:
            half = 2 ** (self.residual_bits - 1)
            left = ((at - codes.to(at.dtype)) * (2 * half)).round().clamp(-half, half - 1) + half
            parts.append(self._packed(left.nan_to_num(half), self.residual_bits))
        return torch.cat(parts, -1)

    def decode(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [..., bytes] -> [..., N]."""
        codes, scales, _ = held.split(self.sizes, -1)
        if self.bits < 8:
            scale, zero = (_numbers(part, SCALE_DTYPE) for part in scales.chunk(2, -1))
            steps = self._unpacked(codes, self.bits).to(dtype) - 2 ** (self.bits - 1)
            return steps * self._spread(scale, dtype) + self._spread(zero, dtype)
        found = codes.contiguous().view(self.dtype).to(dtype)
        return found * self._spread(_numbers(scales, WIDE_SCALE), dtype)

    def residual(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [..., bytes] -> what rounding left [..., N]."""
        _, scales, left = held.split(self.sizes, -1)
        half = 2 ** (self.residual_bits - 1)
        steps = (self._unpacked(left, self.residual_bits).to(dtype) - half) / (2 * half)
        return steps * self._spread(_numbers(scales, WIDE_SCALE), dtype)

    def _spread(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """[..., groups] -> [..., N], or [..., 1] of a single one."""
        scale = scale.to(dtype)
        if self.groups == 1:
            return scale
        return scale.repeat_interleave(self.group, -1)[..., : self.numbers]

    def _packed(self, codes: Tensor, bits: int) -> Tensor:
        full = F.pad(codes.to(torch.uint8), (0, -self.numbers % RUN))
        return pack(full, bits)[..., : ceil(self.numbers * bits / 8)]

    def _unpacked(self, packed: Tensor, bits: int) -> Tensor:
        whole = ceil(self.numbers / RUN) * bits
        return unpack(F.pad(packed, (0, whole - packed.shape[-1])), bits)[..., : self.numbers]


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _numbers(held: Tensor, dtype: torch.dtype) -> Tensor:
    return held.contiguous().view(dtype)


def stochastic(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """x in the shorter `dtype`, rounded up or down, each as likely as it is near.

    noise: of x's shape, from 0 up to 1. Beyond the largest number it is that one; what is not
    finite stays so.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent.sub_(1)
    least = torch.frexp(torch.tensor(info.smallest_normal)).exponent - 1
    # The distance to the next number: a power of two, so that dividing by it is exact.
    step = torch.ldexp(torch.full_like(x, info.eps), exponent.clamp(min=int(least)))
    rounded = (x / step + noise.to(x.dtype)).floor() * step
    return torch.where(x.isfinite(), rounded.clamp(info.min, info.max), x).to(dtype)


def hashed_uniform(seeds: Tensor, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    """Numbers from 0 up to 1 that depend on nothing but their seed, salt and place.

    seeds: int64 [...]; returns float32 [..., *shape]. The same wherever and whenever it is asked:
    what is rounded by them does not depend on who shares a batch.
    """
    count = torch.Size(shape).numel()
    place = torch.arange(count, device=seeds.device).view(shape)
    start = (seeds * 0x9E3779B1 + salt * 0x85EBCA77 + 0x27220A95) & _WORD
    mixed = _mixed(start.view(*seeds.shape, *[1] * len(shape)))
    found = _mixed((mixed + place * 0x9E3779B1) & _WORD)
    # 24 bits are exact in float32, and the greatest of them is less than 1.
    return (found >> 8).float() / 2**24


_WORD = 0xFFFFFFFF


def _mixed(word: Tensor) -> Tensor:
    """Scatter the bits of 32-bit words, held in int64."""
    word = word ^ word >> 16
    word = word * 0x7FEB352D & _WORD
    word = word ^ word >> 15
    word = word * 0x846CA68B & _WORD
    return word ^ word >> 16
