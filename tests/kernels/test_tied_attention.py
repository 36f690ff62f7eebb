"""Attention over tied rows in torch against its float64 oracle."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.latent.torch import tied_attention, tied_attention_ref

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [1, 63, 1000])
@pytest.mark.parametrize(("new", "ragged"), [(1, False), (1, True), (3, False), (9, True)])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 2), (4, 4)])
def test_equals_the_oracle(
    heads: int, groups: int, new: int, ragged: bool, rows: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    batch = 2 if ragged else 1

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q, q_rotary = random(2, new, heads, 6), random(2, new, heads, 4)
    # Rows as a store has them: planes that lie apart, of which the newest are seen.
    tied, key = random(groups, 2, rows + 5, 10).transpose(0, 1)[:, :, :rows], random(2, rows, 4)
    lengths = torch.randint(1, rows + 1, (batch, new), generator=generator)
    mask = torch.arange(rows) < lengths[..., None]
    got = tied_attention(q, q_rotary, tied, key, scale=0.3, mask=mask)
    expected = tied_attention_ref(q, q_rotary, tied, key, scale=0.3, mask=mask)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[dtype])


def test_without_a_mask_everything_is_seen_at_the_flops_that_are_declared() -> None:
    q, q_rotary = torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 4)
    tied, key = torch.randn(2, 3, 17, 8), torch.randn(2, 17, 4)
    with FlopCounterMode(display=False) as count:
        got = tied_attention(q, q_rotary, tied, key, scale=0.3)
    everything = torch.ones(1, 3, 17, dtype=torch.bool)
    expected = tied_attention_ref(q, q_rotary, tied, key, scale=0.3, mask=everything)
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[torch.float32])
    assert count.get_total_flops() == 2 * 2 * 6 * 3 * 17 * (5 + 4 + 8)


def test_heads_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="q has 4 heads, not divisible by the 3 heads of tied"):
        tied_attention(
            torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 4), torch.randn(1, 3, 5, 8),
            torch.randn(1, 5, 4), scale=1.0,
        )  # fmt: skip
