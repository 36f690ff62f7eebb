"""`nsa` against fla-core's naive forms of its three attentions, in one pass and step by step.

Their selection is a loop over tokens. Their window is a kernel of flash-attn's, here their naive
attention; their mean pooling is a Triton kernel, here a plain mean, of an incomplete block as well.
"""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from archs.mixer import Place
from archs.nsa import SparseBlockAttention, SparseBlockConfig
from tests.archs.recurrent import assert_close, mixer_steps

pytestmark = pytest.mark.peers

D = 48
#: Query heads, KV heads, channels, block, picks, window.
SHAPES = [
    (4, 2, 8, 4, 4, 8), (6, 2, 6, 5, 4, 3), (3, 3, 4, 3, 5, 20), (4, 1, 16, 8, 4, 1),
    (5, 1, 2, 1, 6, 4), (16, 1, 8, 2, 7, 9), (2, 2, 4, 16, 4, 33), (32, 2, 4, 3, 4, 6),
]  # fmt: skip


def naive() -> Any:
    return import_module("fla.ops.nsa.naive")


def pooled(x: Tensor, size: int, cu_seqlens: None = None) -> Tensor:
    """[B, T, G, d] -> [B, ceil(T / size), G, d]."""
    return torch.stack([part.mean(1) for part in x.split(size, 1)], 1)


def mixer_of(shape: tuple[int, ...]) -> SparseBlockAttention:
    heads, groups, dim, block, picks, window = shape
    config = SparseBlockConfig(
        n_heads=heads, kv_heads=groups, head_dim=dim, block=block, picks=picks, window=window
    )
    mixer = SparseBlockAttention(config, Place(d_model=D, n_layers=1, layer=0, siblings=(0,)))
    draw = torch.Generator().manual_seed(sum(shape))
    with torch.no_grad():
        for weight in mixer.parameters():
            # Peaked weights: blocks differ by more than rounding.
            weight.normal_(0, 2 * D**-0.5, generator=draw)
    return mixer


def expected(mixer: SparseBlockAttention, x: Tensor) -> Tensor:
    """Their three attentions, weighed by our gates and put through our last projection."""
    c, theirs = mixer.config, naive()
    q, kv = mixer._rotated(mixer._heads(x)[0])
    k, v = kv.unbind(2)
    means, picked, window = mixer._gates(x).unbind(2)
    scale, size = c.head_dim**-0.5, c.block
    k_means, v_means = pooled(k, size), pooled(v, size)
    of_means, _ = theirs.naive_nsa_compression(q, k_means, v_means, size, scale)
    at = theirs.naive_nsa_topk(q, k_means, c.picks, size, scale)
    of_picked = theirs.naive_nsa_selection(q, k, v, at, size, scale)
    attn = import_module("fla.ops.attn.naive").naive_parallel_attn
    of_window, _ = attn(q, k, v, window_size=c.window)
    pairs = ((means, of_means), (picked, of_picked), (window, of_window))
    return mixer.out(sum(gate[..., None] * out for gate, out in pairs).flatten(2))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 1), (1, 63), (2, 90)])
@torch.inference_mode()
def test_one_pass_and_steps(shape: tuple[int, ...], batch: int, tokens: int) -> None:
    mixer = mixer_of(shape)
    x = torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(tokens))
    wanted = expected(mixer, x)
    assert_close(mixer(x), wanted)
    assert_close(mixer_steps(mixer, x, [1] * tokens), wanted)
    sizes = [n for n in (33, 1, 4, 9) if n < tokens]
    assert_close(mixer_steps(mixer, x, [*sizes, tokens - sum(sizes)]), wanted)


@pytest.mark.parametrize("shape", [(16, 1, 8, 4, 4, 8), (32, 2, 4, 5, 6, 6)], ids=str)
@torch.inference_mode()
def test_their_whole_form(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for 16 query heads or more to a KV head, and leaves the window to flash-attn."""
    mixer = mixer_of(shape)
    x = torch.randn(2, 70, D, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(naive(), "mean_pooling", pooled)
    monkeypatch.setattr(naive(), "flash_attn_func", windowed)
    c = mixer.config
    q, kv = mixer._rotated(mixer._heads(x)[0])
    gates = mixer._gates(x).unbind(2)
    theirs = naive().naive_nsa(
        q, *kv.unbind(2), *gates, block_counts=c.picks, block_size=c.block, window_size=c.window
    )
    assert_close(mixer(x), mixer.out(theirs.flatten(2)))


def windowed(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: Any) -> Tensor:
    assert causal and window_size[1] == 0
    attn = import_module("fla.ops.attn.naive").naive_parallel_attn
    found: Tensor = attn(q, k, v, window_size=window_size[0] + 1)[0]
    return found
