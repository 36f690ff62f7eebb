"""Index scores, the choice of rows and attention over them, each against its float64 oracle."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels.sparse.torch as sparse
from kernels.attention.torch import FLOP_FORMULAS
from kernels.sparse.torch import (
    best_rows,
    best_rows_ref,
    index_flops,
    index_loss,
    index_scores,
    index_scores_ref,
    mean_attention,
    picked_attention,
    picked_attention_ref,
    picked_mask,
)

SHAPES = [(1, 1, 1, 1, 2), (2, 1, 3, 63, 8), (3, 5, 2, 17, 6), (1, 33, 4, 100, 7)]
#: Rounding of the outputs alone: scores are float32 whatever they are made of.
TOLERANCE = {
    torch.float64: 2e-7, torch.float32: 2e-7, torch.bfloat16: 2e-7, torch.float16: 2e-7,
}  # fmt: skip
ATTENTION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, weights and keys of [batch, new, heads, rows, dim]."""
    batch, new, heads, rows, dim = shape
    draw = torch.Generator().manual_seed(sum(shape))
    sizes = [(batch, new, heads, dim), (batch, new, heads), (batch, rows, dim)]
    return tuple(torch.randn(size, generator=draw).to(dtype) for size in sizes)


def causal(new: int, rows: int) -> Tensor:
    return torch.ones(1, new, rows, dtype=torch.bool).tril(max(0, rows - new))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scores_equal_the_oracle(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = operands(shape, dtype)
    with FlopCounterMode(display=False) as count:
        got = index_scores(*given)
    wanted = index_scores_ref(*given)
    assert got.dtype == torch.float32
    size = float(wanted.abs().max()) or 1.0
    assert float((got.double() - wanted).abs().max()) <= TOLERANCE[dtype] * size
    batch, new, heads, rows, dim = shape
    assert count.get_total_flops() == index_flops(batch * new, heads, dim, rows)


def test_scores_of_long_contexts_are_those_of_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are taken in pieces: the same bits, and the same gradients."""
    given = [t.requires_grad_() for t in operands((2, 3, 2, 50, 4))]
    whole = index_scores(*given)
    wanted = torch.autograd.grad(whole.square().sum(), given)
    monkeypatch.setattr(sparse, "COPY_BYTES", 0)
    monkeypatch.setattr(sparse, "LEAST_ROWS", 7)
    pieces = index_scores(*given)
    assert torch.equal(pieces, whole)
    for got, one in zip(torch.autograd.grad(pieces.square().sum(), given), wanted, strict=True):
        torch.testing.assert_close(got, one)


def test_scores_have_gradients() -> None:
    given = [t.double().requires_grad_() for t in operands((2, 3, 2, 5, 4))]
    mine = torch.autograd.grad(index_scores(*given).double().square().sum(), given)
    theirs = torch.autograd.grad(index_scores_ref(*given).square().sum(), given)
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_score_does_not_depend_on_its_company() -> None:
    """Bit for bit: one token, one row, one sequence alone score what they score beside others."""
    q, weights, keys = operands((3, 40, 4, 300, 32))
    whole = index_scores(q, weights, keys)
    for t in range(0, 40, 7):
        alone = index_scores(q[:, t : t + 1], weights[:, t : t + 1], keys)
        assert torch.equal(alone[:, 0], whole[:, t])
        fewer = index_scores(q[:, t : t + 2], weights[:, t : t + 2], keys[:, : 100 + t])
        assert torch.equal(fewer, whole[:, t : t + 2, : 100 + t])
    assert torch.equal(index_scores(q[1:2], weights[1:2], keys[1:2]), whole[1:2])


@pytest.mark.parametrize("count", [1, 4, 16, 200])
@pytest.mark.parametrize("values", [2, 5, 10**6])
@pytest.mark.parametrize(("new", "rows"), [(1, 1), (1, 63), (5, 17), (33, 100)])
def test_rows_are_those_of_a_stable_sort(count: int, values: int, new: int, rows: int) -> None:
    """Of few values, so that ties are everywhere, at the threshold too; negative ones, and -0.0."""
    draw = torch.Generator().manual_seed(count + values)
    scores = torch.randint(-values, values, (2, new, rows), generator=draw) / 3
    scores[..., ::2] *= -1
    mask = causal(new, rows) & (torch.rand(2, new, rows, generator=draw) > 0.1)
    at, valid = best_rows(scores, mask, count)
    assert at.shape == valid.shape == (2, new, min(count, rows))
    got = [
        [r[v].tolist() for r, v in zip(a, b, strict=True)] for a, b in zip(at, valid, strict=True)
    ]
    wanted = best_rows_ref(scores, mask, count)
    assert got == wanted
    as_mask = picked_mask(at, valid, rows)
    assert [[m.nonzero()[:, 0].tolist() for m in ms] for ms in as_mask] == wanted


def test_the_earlier_of_equal_rows_wins_and_zeros_of_both_signs_are_equal() -> None:
    everything = torch.ones(1, 1, 6, dtype=torch.bool)
    scores = torch.tensor([[[-0.0, 0.0, -0.0, 7.0, 0.0, -1.0]]])
    for count, rows in ((1, [3]), (2, [0, 3]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4])):
        at, valid = best_rows(scores, everything, count)
        assert at[0, 0].tolist() == rows and valid.all()
    at, _ = best_rows(torch.zeros(1, 1, 6), everything, 3)
    assert at[0, 0].tolist() == [0, 1, 2]


def test_scores_of_another_width_are_refused() -> None:
    everything = torch.ones(1, 1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"scores are torch\.float64; rows are ranked by float32"):
        best_rows(torch.zeros(1, 1, 3, dtype=torch.float64), everything, 2)


@pytest.mark.parametrize("dtype", ATTENTION, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 1, 4, 9, 10), (3, 5, 2, 17, 6)], ids=str)
def test_attention_over_own_rows_equals_the_oracle(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, new, heads, count, dim = shape
    draw = torch.Generator().manual_seed(count)
    q = torch.randn(batch, new, heads, dim, generator=draw).to(dtype)
    rows = torch.randn(batch, new, count, dim, generator=draw).to(dtype)
    valid = torch.rand(batch, new, count, generator=draw) > 0.3
    valid[..., 0] = True
    width = dim - 1
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counted:
        got = picked_attention(q, rows, valid, v_dim=width, scale=0.3)
    wanted = picked_attention_ref(q, rows, valid, v_dim=width, scale=0.3)
    torch.testing.assert_close(got.double(), wanted, rtol=ATTENTION[dtype], atol=ATTENTION[dtype])
    assert got.dtype == dtype
    assert counted.get_total_flops() == 2 * batch * new * heads * count * 2 * dim


def test_the_loss_is_the_divergence_from_the_mean_of_the_heads() -> None:
    q, k = torch.randn(2, 9, 3, 4), torch.randn(2, 3, 9, 4)
    attention = mean_attention(q, k, scale=0.5)
    logits = 0.5 * torch.einsum("bthd,bhsd->bhts", q.double(), k.double())
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(later, -torch.inf).softmax(-1).mean(1)
    torch.testing.assert_close(attention.double(), weights, rtol=1e-5, atol=1e-6)
    # What stands in the place of later tokens does not count.
    scores = weights.float().log().masked_fill(later, 9.0)
    assert float(index_loss(scores, attention)) < 1e-6
    scores = torch.randn(2, 9, 9)
    kl = 0.0
    for b in range(2):
        for t in range(9):
            p, log_q = weights[b, t, : t + 1], scores[b, t, : t + 1].double().log_softmax(-1)
            kl += float((p * (p.log() - log_q)).sum()) / 18
    assert float(index_loss(scores, attention)) == pytest.approx(kl, rel=1e-5)
