"""Results of splits put together: every width, unused splits, rows that saw nothing."""

import pytest
import torch
from torch import Tensor

import kernels.attention.combine as module
from tests.kernels.interpreter import interpreted


def combined_ref(partials: Tensor, lse: Tensor, used: list[int]) -> Tensor:
    """float64 [B, parts, M, D]; what lies in unused splits is not read."""
    batch, parts = partials.shape[:2]
    rows = []
    for counter in range(batch * parts):
        n = used[counter]
        piece = partials.flatten(0, 1)[counter, :n].double()
        logits = lse.flatten(0, 1)[counter, :n].double()
        weights = torch.exp2(logits - logits.amax(0).nan_to_num(neginf=0.0))
        total = weights.sum(0)
        rows.append((weights[..., None] * piece).sum(0) / total.where(total > 0, 1.0)[:, None])
    return torch.stack(rows).unflatten(0, (batch, parts))


@pytest.mark.parametrize("splits", [2, 3, 40])
@pytest.mark.parametrize("d", [64, 96, 256])
def test_equals_reference(d: int, splits: int) -> None:
    # Two kv heads of six heads each, three tokens: 18 rows in two blocks, the last of them short.
    batch, kv_heads, group, tokens, block_m, row_blocks = 2, 2, 6, 3, 16, 2
    partials = torch.randn(batch, kv_heads * row_blocks, splits, block_m, d)
    lse = torch.randn(partials.shape[:-1]) * 20
    lse[0, 1, :, 1] = -torch.inf
    used = [splits, splits, 2, splits - 1 or 1, splits, 1, 2, splits]
    for counter, n in enumerate(used):
        for tensor in (partials, lse):
            tensor.flatten(0, 1)[counter, n:] = torch.nan
    out = torch.full((batch, tokens, kv_heads * group, d), -7.0)
    with interpreted():
        module.split_combine(
            partials, lse, torch.tensor(used, dtype=torch.int32), out, row_blocks=row_blocks
        )
    expected = combined_ref(partials, lse, used)
    for b in range(batch):
        for row in range(group * tokens):
            for g in range(kv_heads):
                part = g * row_blocks + row // block_m
                got = out[b, row // group, g * group + row % group]
                if used[b * kv_heads * row_blocks + part] == 1:
                    assert (got == -7.0).all(), "a lone split has written its own result"
                else:
                    want = expected[b, part, row % block_m]
                    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
