"""Softmax attention against its float64 oracle, one token at a time and many, grouped, masked."""

import pytest
import torch

from kernels.attention.torch import (
    attention,
    attention_ref,
    attention_with_sinks,
    latent_attention,
    window_mask,
)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize(("new", "rows"), [(1, 1), (1, 63), (4, 40), (17, 17), (30, 65)], ids=str)
@pytest.mark.parametrize("v_dim", [8, 5, 12])
def test_attention_equals_the_oracle(
    heads: tuple[int, int], new: int, rows: int, v_dim: int
) -> None:
    h, g = heads
    q = torch.randn(2, new, h, 8)
    k, v = torch.randn(2, g, rows, 8), torch.randn(2, g, rows, v_dim)
    mask = torch.rand(2, 1, new, rows) > 0.3
    mask[..., 0] = True
    got = attention(q, k, v, mask=mask)
    expected = attention_ref(q, k, v, scale=8**-0.5, mask=mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 4, 8, 9])
@pytest.mark.parametrize("v_dim", [8, 5])
@pytest.mark.parametrize(
    "shape",
    ["{S}", "1,{S}", "{K},{S}", "1,{K},{S}", "1,1,{S}", "1,1,{K},{S}", "2,1,1,{S}", "2,1,{K},1"],
)
def test_masks_broadcast_to_batch_tokens_and_rows(shape: str, v_dim: int, new: int) -> None:
    rows = 11
    q, k, v = torch.randn(2, new, 4, 8), torch.randn(2, 2, rows, 8), torch.randn(2, 2, rows, v_dim)
    mask = torch.rand([int(n) for n in shape.format(K=new, S=rows).split(",")]) > 0.4
    mask[..., 0] = True
    whole = mask.broadcast_to(2, 1, new, rows)
    got = attention(q, k, v, mask=mask)
    expected = attention_ref(q, k, v, scale=8**-0.5, mask=whole)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 9, 64])
def test_causal_is_the_lower_triangle(new: int) -> None:
    q, k, v = torch.randn(2, new, 4, 6), torch.randn(2, 2, new, 6), torch.randn(2, 2, new, 6)
    mask = torch.ones(new, new, dtype=torch.bool).tril()[None, None]
    got = attention(q, k, v, causal=True, scale=0.3)
    expected = attention_ref(q, k, v, scale=0.3, mask=mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize(("new", "rows"), [(1, 63), (4, 40), (17, 17)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_learned_sinks_take_their_share_of_the_softmax(
    heads: tuple[int, int], new: int, rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    h, g = heads
    q = torch.randn(2, new, h, 8, dtype=dtype)
    k, v = torch.randn(2, g, rows, 8, dtype=dtype), torch.randn(2, g, rows, 5, dtype=dtype)
    sinks = 3 * torch.randn(h, dtype=dtype)
    mask = torch.rand(2, 1, new, rows) > 0.3
    mask[..., 0] = True
    expected = attention_ref(q, k, v, scale=8**-0.5, mask=mask, sinks=sinks)
    got = attention_with_sinks(q, k, v, sinks, mask=mask)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    if new == rows:
        causal = torch.ones(new, new, dtype=torch.bool).tril()[None, None]
        expected = attention_ref(q, k, v, scale=8**-0.5, mask=causal, sinks=sinks)
        got = attention_with_sinks(q, k, v, sinks, causal=True)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_sink_that_is_never_seen_changes_nothing() -> None:
    q, k, v = torch.randn(1, 5, 4, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    got = attention_with_sinks(q, k, v, torch.full((4,), -1e4), causal=True)
    torch.testing.assert_close(got, attention(q, k, v, causal=True))


@pytest.mark.parametrize("new", [1, 5, 20])
def test_latent_attention_reads_values_from_the_keys(new: int) -> None:
    q, rows = torch.randn(2, new, 4, 10), torch.randn(2, 1, 33, 10)
    mask = torch.rand(2, 1, new, 33) > 0.3
    mask[..., 0] = True
    got = latent_attention(q, rows, v_dim=7, scale=0.4, mask=mask)
    expected = attention_ref(q, rows, rows[..., :7], scale=0.4, mask=mask)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_window_mask_counts_the_token_itself_and_keeps_sinks() -> None:
    mask = window_mask(6, 2, 1, torch.device("cpu")).int().tolist()
    assert mask[0] == [1, 0, 0, 0, 0, 0]
    assert mask[1] == [1, 1, 0, 0, 0, 0]
    assert mask[4] == [1, 0, 0, 1, 1, 0]


def test_bad_operands_are_refused() -> None:
    q, k = torch.randn(1, 3, 3, 4), torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="3 heads, not divisible by the 2"):
        attention(q, k, k)
    with pytest.raises(ValueError, match="3 heads, not divisible by the 2"):
        attention_with_sinks(q, k, k, torch.zeros(3))
    k = torch.randn(1, 3, 5, 4)
    with pytest.raises(ValueError, match="causal=True"):
        attention(q, k, k, causal=True)
    with pytest.raises(ValueError, match="causal=True"):
        attention_with_sinks(q, k, k, torch.zeros(3), causal=True)
