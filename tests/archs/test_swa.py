"""`swa` equals Mistral's sliding window; sinks equal a naive mask."""

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from archs.gqa import Attention
from archs.registry import ModelSpec
from archs.sizes import Scale
from tests.archs.hf import (
    assert_equal,
    copy_attention,
    copy_backbone,
    our_steps,
    pieces_of,
    random_model,
)


def small_scale(heads: int, head_dim: int, window: int, n_layers: int = 2) -> Scale:
    return Scale(
        name="test", d_model=heads * head_dim, n_layers=n_layers, head_dim=head_dim,
        vocab_size=101, seq_len=64, window=window,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window", "length", "cuts"),
    [
        pytest.param(3, 3, 8, 7, 31, [5, 11], id="four-windows-short-chunks"),
        pytest.param(4, 2, 6, 5, 43, [17, 40], id="grouped-chunks-beyond-the-window"),
        pytest.param(2, 2, 10, 16, 57, [16, 32, 49], id="chunks-of-a-window"),
        pytest.param(2, 1, 8, 2, 9, [3], id="window-of-two"),
        pytest.param(4, 2, 8, 3, 8, [4], id="grouped-and-short"),
        pytest.param(2, 2, 8, 64, 23, [9], id="window-longer-than-the-context"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_model_equals_mistral(
    heads: int, kv_heads: int, head_dim: int, window: int, length: int, cuts: list[int], batch: int
) -> None:
    scale = small_scale(heads, head_dim, window)
    config = MistralConfig(
        vocab_size=101, hidden_size=scale.d_model, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=1e-5, tie_word_embeddings=True, sliding_window=window,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    theirs = random_model(MistralForCausalLM, config, seed=window)
    spec = ModelSpec(arch="swa", scale=scale, overrides={"swa": {"kv_heads": kv_heads}}, hidden=37)
    model = spec.build()
    for mixer, other in copy_backbone(model, theirs):
        copy_attention(mixer, other)
    tokens = torch.randint(0, 101, (batch, length))
    assert_equal(model, theirs, tokens, cuts)


def naive_attention(mixer: Attention, x: Tensor) -> Tensor:
    """One token, one head at a time over a list of visible positions. x: [T, D]."""
    c = mixer.config
    qkv = mixer.qkv(x).double().unflatten(-1, (-1, c.head_dim))
    pair = torch.arange(c.head_dim // 2).double()
    turn = torch.arange(len(x))[:, None] * c.rope_theta ** (-2 * pair / c.head_dim)
    turned = torch.view_as_complex(qkv.unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(turn), turn
    ).unsqueeze(1)
    rotated = torch.view_as_real(turned).flatten(-2)
    out = torch.zeros(len(x), c.n_heads, c.head_dim, dtype=torch.float64)
    assert c.window is not None
    for i in range(len(x)):
        visible = [j for j in range(i + 1) if i - j < c.window or j < c.sinks]
        for h in range(c.n_heads):
            g = h // (c.n_heads // c.kv_heads)
            k, v = rotated[visible, c.n_heads + g], qkv[visible, c.n_heads + c.kv_heads + g]
            out[i, h] = (k @ rotated[i, h] * c.head_dim**-0.5).softmax(0) @ v
    return mixer.out(out.flatten(1).float())


@pytest.mark.parametrize(
    ("window", "sinks", "kv_heads"), [(5, 0, 4), (5, 3, 4), (3, 4, 2), (1, 1, 1), (50, 2, 4)]
)
def test_parallel_form_equals_naive_mask(window: int, sinks: int, kv_heads: int) -> None:
    options = {"window": window, "sinks": sinks, "kv_heads": kv_heads}
    scale = small_scale(4, 6, window)
    spec = ModelSpec(arch="swa", scale=scale, overrides={"swa": options}, hidden=8)
    mixer = spec.build(seed=3).layers[0].mixer
    assert isinstance(mixer, Attention)
    x = torch.randn(29, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mixer(x[None])[0], naive_attention(mixer, x))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 2), (5, 1), (5, 3), (5, 8)])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_stepwise_form_equals_parallel_form(window: int, sinks: int, page_size: int) -> None:
    spec = ModelSpec(
        arch="swa", scale=small_scale(4, 6, window), overrides={"swa": {"sinks": sinks}}
    )
    model = spec.build(seed=1)
    tokens = torch.randint(0, 101, (2, 37))
    with torch.inference_mode():
        expected = model(tokens)
    for cuts in ([], [2, 3, 19, 30], [37]):
        stepwise = our_steps(model, pieces_of(tokens, cuts), page_size=page_size)
        torch.testing.assert_close(stepwise, expected, rtol=1e-4, atol=1e-4)


def test_layers_reach_back_one_window_each_less_the_token_itself() -> None:
    window, layers, length = 4, 3, 20
    model = ModelSpec(arch="swa", scale=small_scale(2, 8, window, layers)).build()
    tokens = torch.randint(0, 100, (1, length))
    reach = layers * (window - 1)
    with torch.inference_mode():
        last = model(tokens)[0, -1]
        for back, seen in ((reach, True), (reach + 1, False)):
            other = tokens.clone()
            other[0, length - 1 - back] = 100
            assert bool((model(other)[0, -1] != last).any()) is seen


def test_state_stops_growing_at_the_window() -> None:
    model = ModelSpec(arch="swa", scale=small_scale(2, 8, window=8)).outline()
    rows = [model.state_bytes(n) // (2 * 2 * 16 * 4) for n in (3, 8, 9, 1000)]
    assert rows == [3, 8, 8, 8]
