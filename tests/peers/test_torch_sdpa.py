"""Our attention forms against torch's SDPA in its plain backend, heads repeated, masks written out.

No fused kernel of torch takes part in what is expected, and rows that a mask hides come first.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention.torch import attention, latent_attention, window_mask
from tests.peers.forms import BOTH, LATENT, PAGED, Form, cases, close, paged

pytestmark = pytest.mark.peers

B = 2
HEADS = [(4, 4), (6, 2), (4, 1)]


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """q [B, K, H, d], k and v [B, G, S, d or dv], mask [.., K, S]; all in the given dtype."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[1], 1) for t in (k, v))
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, scale=scale
        )  # fmt: skip
    return out.transpose(1, 2)


def newest(tokens: int, rows: int, window: int | None = None, sinks: int = 0) -> Tensor:
    """What the last `tokens` of `rows` positions see."""
    return window_mask(rows, window or rows, sinks, torch.device("cpu"))[rows - tokens :]


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("value_dim", [16, 8, 24])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("new", "rows"), [(1, 1), (1, 63), (3, 65), (8, 100), (9, 65), (63, 63)])
def test_new_tokens_on_a_cache(
    new: int, rows: int, heads: tuple[int, int], value_dim: int, dtype: torch.dtype
) -> None:
    h, g = heads
    q = torch.randn(B, new, h, 16, dtype=dtype)
    k, v = (torch.randn(B, g, rows, d, dtype=dtype) for d in (16, value_dim))
    mask = newest(new, rows)
    got, expected = attention(q, k, v, mask=mask[None, None]), plain(q, k, v, mask)
    if new == 1 and value_dim != 16:
        # This branch takes its softmax in float32, whatever the inputs.
        got, expected = got.float(), expected.float()
    close(got, expected)
    if new == rows:
        close(attention(q, k, v, causal=True, scale=0.3), plain(q, k, v, mask, 0.3))


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (20, 0), (20, 4), (100, 3)])
def test_window_and_sinks(
    window: int, sinks: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    h, g = heads
    q = torch.randn(B, 65, h, 16, dtype=dtype)
    k, v = torch.randn(2, B, g, 65, 16, dtype=dtype)
    mask = newest(65, 65, window, sinks)
    close(attention(q, k, v, mask=mask[None, None]), plain(q, k, v, mask))


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("new", [1, 3, 63])
def test_latent_attention(new: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    h, g = heads
    q = torch.randn(B, new, h, 24, dtype=dtype)
    rows = torch.randn(B, g, 65, 24, dtype=dtype)
    mask = newest(new, 65)
    got = latent_attention(q, rows, v_dim=16, scale=0.2, mask=mask[None, None])
    close(got, plain(q, rows, rows[..., :16], mask, 0.2))


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"window": 70, "sinks": 4}], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("form", "dtype", "new"), cases(PAGED, [1, 3, 8, 63]))
def test_pages(
    form: Form, dtype: torch.dtype, new: int, heads: tuple[int, int], options: dict[str, Any]
) -> None:
    lengths = [700, 65, new]
    q, (k, v), inputs = paged(lengths, heads, new)
    got = form(q=q, **inputs, **options)
    for b, length in enumerate(lengths):
        mask = newest(new, length, **options)
        close(got[b : b + 1], plain(q[b : b + 1], k[b][None], v[b][None], mask))


@pytest.mark.parametrize("options", [{}, {"window": 70, "sinks": 4}], ids=str)
@pytest.mark.parametrize("heads", [(4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("form", LATENT, ids=str)
def test_latent_pages(
    form: Form, new: int, heads: tuple[int, int], options: dict[str, Any]
) -> None:
    lengths = [300, 63, 8]
    q, (rows, _), inputs = paged(lengths, heads, new, dim=80)
    del inputs["v_pool"]
    parts = {"q": q[..., :64].contiguous(), "q_rotary": q[..., 64:].contiguous()}
    got = form(**parts, pool=inputs.pop("k_pool"), scale=0.1, **inputs, **options)
    for b, length in enumerate(lengths):
        seen, mask = rows[b][None], newest(new, length, **options)
        close(got[b : b + 1], plain(q[b : b + 1], seen, seen[..., :64], mask, 0.1))
