"""Attention over block means and the choice of blocks, each against its float64 oracle."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.blocks.torch import (
    attend_means,
    attend_means_ref,
    best_blocks,
    best_blocks_ref,
    block_means,
    blocks_mask,
    means_flops,
)

#: Batch, new tokens, query heads, KV heads, channels, means.
SHAPES = [(1, 1, 1, 1, 2, 1), (2, 1, 6, 3, 8, 17), (3, 5, 4, 1, 6, 9), (1, 33, 4, 4, 7, 63)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
#: Weights are float32 whatever they are made of.
WEIGHTS = 2e-7


def operands(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, and a mask of which the first token of the first sequence sees nothing."""
    batch, new, heads, groups, dim, means = shape
    draw = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, new, heads, dim, generator=draw).to(dtype)
    k, v = torch.randn(2, batch, groups, means, dim, generator=draw).to(dtype)
    mask = torch.rand(batch, new, means, generator=draw) < 0.6
    mask[0, 0] = False
    return q, k, v, mask


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_over_means_equals_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = operands(shape, dtype)
    with FlopCounterMode(display=False) as count:
        out, weights = attend_means(*given, scale=0.7)
    wanted, of_blocks = attend_means_ref(*given, scale=0.7)
    assert out.dtype == dtype and weights.dtype == torch.float32
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=limit, atol=limit)
    torch.testing.assert_close(weights.double(), of_blocks, rtol=WEIGHTS, atol=WEIGHTS)
    assert not out[0, 0].any() and not weights[0, 0].any()
    batch, new, heads, _, dim, means = shape
    assert count.get_total_flops() == means_flops(batch * new, heads, dim, means)


def test_attention_over_means_has_gradients_and_its_weights_have_none() -> None:
    given = [t.double().requires_grad_() for t in operands((2, 3, 4, 2, 5, 6))[:3]]
    mask = operands((2, 3, 4, 2, 5, 6))[3]
    out, weights = attend_means(*given, mask, scale=0.3)  # type: ignore[call-arg]
    assert not weights.requires_grad
    mine = torch.autograd.grad(out.square().sum(), given)
    theirs = torch.autograd.grad(
        attend_means_ref(*given, mask, scale=0.3)[0].square().sum(),
        given,  # type: ignore[call-arg]
    )
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted)


def test_without_means_nothing_is_seen() -> None:
    q, k, v, mask = operands((2, 3, 4, 2, 5, 6))
    out, weights = attend_means(q, k[:, :, :0], v[:, :, :0], mask[..., :0], scale=1.0)
    assert out.shape == q.shape and not out.any() and weights.shape == (2, 3, 2, 0)


def test_a_weight_does_not_depend_on_its_company() -> None:
    """Bit for bit: one token, one sequence alone, and further means that it does not see."""
    q, k, v, _ = operands((3, 40, 4, 2, 32, 50))
    at = torch.arange(40)
    mask = (torch.arange(50) < at[:, None] + 9)[None]
    _, whole = attend_means(q, k, v, mask, scale=0.2)
    for t in range(0, 40, 7):
        seen = t + 9
        _, alone = attend_means(
            q[1:2, t : t + 1], k[1:2, :, :seen], v[1:2, :, :seen], mask[:, t : t + 1, :seen],
            scale=0.2,
        )  # fmt: skip
        assert torch.equal(alone[0, 0], whole[1, t, :, :seen])


@pytest.mark.parametrize("size", [1, 3, 64])
def test_means_do_not_depend_on_how_rows_lie(size: int) -> None:
    rows = torch.randn(2, 3, 5 * size, 7) * 100
    found = block_means(rows, size)
    assert found.dtype == rows.dtype
    wanted = rows.double().unflatten(-2, (5, size)).mean(-2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-7, atol=1e-7)
    turned = rows.transpose(0, 1).flip(-2).flip(-2)
    assert torch.equal(block_means(turned, size).transpose(0, 1), found)
    assert torch.equal(block_means(rows[1:, :, size : 2 * size], size), found[1:, :, 1:2])


@pytest.mark.parametrize("count", [3, 4, 9, 100])
@pytest.mark.parametrize("values", [1, 3, 10**6])
@pytest.mark.parametrize(("batch", "new", "means"), [(1, 1, 1), (2, 5, 17), (3, 33, 40)])
def test_blocks_are_those_of_a_stable_sort(
    count: int, values: int, batch: int, new: int, means: int
) -> None:
    """Of few values, so that ties are everywhere, and of 1, which no forced block loses against."""
    draw = torch.Generator().manual_seed(values + new)
    weights = torch.randint(values, (batch, new, 2, means), generator=draw) / max(1, values - 1)
    own = torch.randint(means + 1, (batch, new), generator=draw)
    at, valid = best_blocks(weights, own, count)
    assert at.shape == (batch, new, 2, min(count - 2, means))
    wanted = best_blocks_ref(weights, own, count)
    got = [
        [[at[b, t, g][valid[b, t, g]].tolist() for g in (0, 1)] for t in range(new)]
        for b in range(batch)
    ]
    assert got == wanted
    mask = blocks_mask(at, valid, own, 3, means * 3 + 2)
    for b in range(batch):
        for t in range(new):
            block = int(own[b, t])
            seen = {*wanted[b][t][1], block, block - 1}
            rows = torch.tensor([r // 3 in seen or r // 3 > block for r in range(means * 3 + 2)])
            assert torch.equal(mask[b, t, 1], rows)
