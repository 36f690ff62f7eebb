"""Rotary positions in place: oracle, the torch form, strided views, refusals, compilation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.rope import rotate as op
from kernels.rope.torch import apply_rope, rope_table
from tests.kernels.interpreter import interpreted

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
LENGTHS = torch.tensor([0, 7, 100], dtype=torch.int32)


def operands(heads: int, dim: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Heads within a wider projection whose other columns are NaN, and the table."""
    wide = torch.full((3, tokens, heads * dim + 24), torch.nan, dtype=dtype)
    wide[..., 8 : 8 + heads * dim] = torch.randn(3, tokens, heads * dim)
    table = rope_table(128, dim, 10_000.0, torch.device("cpu"))
    angles = torch.view_as_real(table).squeeze(1).contiguous()
    return wide[..., 8 : 8 + heads * dim].unflatten(-1, (heads, dim)), angles


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (5, 32), (9, 64), (2, 48), (33, 128)])
def test_equals_oracle_and_torch(heads: int, dim: int, tokens: int, dtype: torch.dtype) -> None:
    x, angles = operands(heads, dim, tokens, dtype)
    expected = op.rope_rotate_ref(x, angles, LENGTHS)
    at = LENGTHS.long()[:, None] + torch.arange(tokens)
    by_torch = apply_rope(x, torch.view_as_complex(angles)[at][:, :, None])
    with interpreted():
        got = op.rope_rotate(x, angles, LENGTHS)
    assert got is x
    scale = expected.abs().max()
    assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * scale
    assert (got.double() - by_torch.double()).abs().max() <= TOLERANCE[dtype] * scale


def test_nothing_else_is_touched_and_far_positions_stay() -> None:
    x, angles = operands(4, 16, 2, torch.float32)
    storage = torch.empty(0).set_(x.untyped_storage())
    before, others = x.clone(), storage.isnan().sum()
    with interpreted():
        op.rope_rotate(x, angles[:9].contiguous(), LENGTHS)
    assert storage.isnan().sum() == others
    assert torch.equal(x[2], before[2]) and not torch.equal(x[1], before[1])


REFUSALS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]]] = {
    "dims": (r"x=.*\[B, K, H, d\]", lambda x, a, n: (x[0], a, n)),
    "dtype": ("x=.*bfloat16", lambda x, a, n: (x.double(), a, n)),
    "odd": ("d=15 must be even", lambda x, a, n: (x[..., :15], a, n)),
    "heads apart": ("x=.*strides", lambda x, a, n: (x.transpose(2, 3), a[:, :2], n)),
    "table": (r"cos_sin=.*\[positions, 8, 2\]", lambda x, a, n: (x, a[:, :4], n)),
    "lengths dtype": ("lengths=.*int32", lambda x, a, n: (x, a, n.long())),
    "lengths shape": ("lengths=.*int32", lambda x, a, n: (x, a, n[:2])),
    "device": ("cos_sin=meta must be on", lambda x, a, n: (x, a.to("meta"), n)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused(case: str) -> None:
    x, angles = operands(4, 16, 1, torch.float32)
    message, change = REFUSALS[case]
    before = x.clone()
    with interpreted(), pytest.raises(ValueError, match=message):
        op.rope_rotate(*change(x, angles, LENGTHS))
    assert torch.equal(x, before)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    x, angles = operands(4, 16, 1, torch.float32)
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        op.rope_rotate(x, angles, LENGTHS)
