"""How the codes of a matrix are chosen where rounding to nearest loses too much.

Both ways know what the matrix is multiplied with: the second moments H = Σ x xᵀ of its inputs, by
which tr((W - Ŵ) H (W - Ŵ)ᵀ) is the squared error of its outputs. AWQ (arXiv 2306.00978) spreads
columns that meet large inputs over more of the grid, then clips groups; GPTQ (arXiv 2210.17323)
rounds column by column and lets the columns that follow make up for each error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from archs.storage import Chosen, to_nearest
from archs.weights import Number
from kernels.quant.torch import (
    SCALE_DTYPE,
    Rounded,
    dense,
    grid,
    in_runs,
    nearest,
    pack,
    round_narrow,
    round_on,
)

#: Exponents of the inputs' magnitudes that AWQ tries for its scales of columns.
EXPONENTS = tuple(n / 20 for n in range(20))
#: Shares of a group's range that AWQ tries to clip it to.
CLIPS = tuple(1 - n / 20 for n in range(11))
#: Share of the mean second moment that GPTQ adds to all of them.
DAMPING = 0.01


@dataclass(slots=True)
class Inputs:
    """What a matrix [N, K] was multiplied with: Σ x xᵀ [K, K], Σ |x| [K], and of how many rows."""

    moments: Tensor
    magnitudes: Tensor
    rows: int = 0

    @classmethod
    def none(cls, columns: int, device: torch.device) -> "Inputs":
        """Of no rows yet."""
        return cls(
            torch.zeros(columns, columns, device=device), torch.zeros(columns, device=device)
        )

    def add(self, x: Tensor) -> None:
        """Count rows [..., K] in."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.moments += flat.t() @ flat
        self.magnitudes += flat.abs().sum(0)
        self.rows += len(flat)


def output_error(weight: Tensor, other: Tensor, inputs: Inputs) -> float:
    """Mean squared error of the outputs, over rows of inputs, with `other` for `weight` [N, K]."""
    away = weight - other
    return float(((away @ inputs.moments) * away).sum()) / max(1, inputs.rows)


def awq(weight: Tensor, number: Number, inputs: Inputs) -> Chosen:
    """Activation-aware codes of a matrix [N, K], float32, and the factors of its inputs [K].

    Columns are multiplied by s = mean|x|^α before they are rounded and inputs by 1 / s; α is that
    of least output error, and so is then the share of its range that each group is clipped to.
    """
    if number.group is None:
        return to_nearest("", weight, number)
    found: tuple[float, Tensor] | None = None
    typical = (inputs.magnitudes / max(1, inputs.rows)).clamp(min=1e-4)
    for exponent in EXPONENTS:
        scales = typical**exponent
        scales = scales / (scales.max() * scales.min()).sqrt()
        # The factors are stored in 16 bits, and codes are chosen for what is stored.
        inverse = (1 / scales).to(SCALE_DTYPE).float()
        rounded = round_narrow(weight / inverse, number.bits, number.group)
        other = dense(rounded, number.bits, weight.shape[1], torch.float32) * inverse
        error = output_error(weight, other, inputs)
        if found is None or error < found[0]:
            found = error, inverse
    assert found is not None
    inverse = found[1]
    moments = inputs.moments * inverse[:, None] * inverse
    return clipped(weight / inverse, number.bits, number.group, moments), inverse


def clipped(weight: Tensor, bits: int, group: int, moments: Tensor) -> Rounded:
    """Codes to nearest on each group's own best grid.

    Of the ranges that shrink the group's to shares of it, the one with the least output error of
    the group alone is taken. moments: Σ x xᵀ of the inputs, [K, K].
    """
    runs = in_runs(weight, group)
    blocks = _blocks(moments, group)
    best = runs.new_full(runs.shape[:-1], torch.inf)
    scale, zero = grid(runs, bits)
    for share in CLIPS:
        middle = (runs.amax(-1) + runs.amin(-1)) / 2
        within = (runs - middle[..., None]) * share + middle[..., None]
        tried = grid(within, bits)
        codes = nearest(runs, *tried, bits)
        steps = (codes - 2 ** (bits - 1)) * tried[0].float()[..., None]
        away = runs - steps - tried[1].float()[..., None]
        error = torch.einsum("ngi,gij,ngj->ng", away, blocks, away)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    return round_on(weight, scale, zero, bits, group)


def _blocks(moments: Tensor, group: int) -> Tensor:
    """The blocks of each group on the diagonal, [K' / group, group, group], zero beyond K."""
    columns = len(moments)
    short = -columns % group
    padded = torch.nn.functional.pad(moments, (0, short, 0, short))
    count = (columns + short) // group
    cut = padded.view(count, group, count, group)
    return cut[torch.arange(count), :, torch.arange(count)]


def gptq(weight: Tensor, number: Number, inputs: Inputs) -> Chosen:
    """Second-order codes of a matrix [N, K], float32; no factors.

    Column by column, the error over the diagonal of the inverse moments' Cholesky factor is taken
    from the columns that follow; a group's grid is that of its columns as they are by then.
    """
    if number.group is None:
        return to_nearest("", weight, number)
    bits, group = number.bits, number.group
    inverse = _inverse_factor(inputs.moments)
    left = weight.clone()
    codes = torch.empty_like(weight)
    scales, zeros = [], []
    for start in range(0, weight.shape[1], group):
        end = min(start + group, weight.shape[1])
        scale, zero = grid(left[:, start:end], bits)
        scales.append(scale)
        zeros.append(zero)
        for column in range(start, end):
            number_of = nearest(left[:, column, None], scale, zero, bits)[:, 0]
            codes[:, column] = number_of
            value = (number_of - 2 ** (bits - 1)) * scale.float() + zero.float()
            error = (left[:, column] - value) / inverse[column, column]
            left[:, column:] -= error[:, None] * inverse[column, column:]
    packed = pack(in_runs(codes, group).flatten(-2), bits)
    return Rounded(packed, torch.stack(scales, -1), torch.stack(zeros, -1)), None


def _inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped moments' inverse."""
    wide = moments.double()
    size = wide.diagonal().mean() * DAMPING
    # Inputs that are always zero say nothing about their columns.
    wide = wide + torch.eye(len(wide), dtype=wide.dtype, device=wide.device) * size.clamp(min=1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    return torch.linalg.cholesky(inverse, upper=True).float()


#: Ways to choose codes from what a matrix is multiplied with, by name.
WAYS = {"awq": awq, "gptq": gptq}
