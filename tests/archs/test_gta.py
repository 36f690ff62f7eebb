"""`gta` equals grouped-tied attention by its definition (arXiv 2505.21487): parallel, in steps."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.gta import TiedAttention, TiedConfig
from archs.mixer import Mixer
from archs.registry import ModelSpec
from archs.sizes import SCALES, Scale
from tests.archs.hf import interleaved, our_steps, pieces_of
from tests.archs.published import half_split, in_place_of, random_matrix, softmax_attention

HEADS = [(4, 1), (4, 2), (4, 4), (6, 3), (1, 1)]
#: Rotary angles are float32.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def model_of(heads: int, kv_heads: int, head_dim: int = 8) -> Model:
    scale = Scale(
        name="t", d_model=heads * head_dim, n_layers=2, head_dim=head_dim, vocab_size=61, seq_len=64
    )
    overrides = {"gta": {"kv_heads": kv_heads}}
    spec = ModelSpec(arch="gta", scale=scale, hidden=24, overrides=overrides)
    return spec.build(dtype=torch.float64).eval()


def published(mixer: Mixer, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Random weights in the layout of the published code, copied into ours, and its function."""
    assert isinstance(mixer, TiedAttention)
    c = mixer.config
    heads, groups, dim, half = c.n_heads, c.kv_heads, c.head_dim, c.head_dim // 2
    width = mixer.out.weight.shape[0]
    w_q, w_kv, w_key, w_out = (
        random_matrix(*shape, generator)
        for shape in ((heads * dim, width), (groups * dim, width), (half, width), (width, width))
    )
    plain, turning = w_q.unflatten(0, (heads, 2, half)).unbind(1)
    turning = torch.cat((turning.flatten(0, 1), w_key))
    with torch.no_grad():
        mixer.qkv.weight.copy_(torch.cat((plain.flatten(0, 1), interleaved(turning, half), w_kv)))
        mixer.out.weight.copy_(w_out)

    def function(x: Tensor) -> Tensor:
        q, tied = x @ w_q.T, x @ w_kv.T
        rotary_key, outputs = half_split(x @ w_key.T), []
        for h in range(heads):
            g = h // (heads // groups)
            query = q[..., h * dim : (h + 1) * dim]
            value = tied[..., g * dim : (g + 1) * dim]
            key = torch.cat((value[..., :half], rotary_key), -1)
            query = torch.cat((query[..., :half], half_split(query[..., half:])), -1)
            outputs.append(softmax_attention(query, key, value))
        return torch.cat(outputs, -1) @ w_out.T

    return function


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("new", [1, 2, 4, 9, 17])
@torch.inference_mode()
def test_model_equals_the_definition(heads: int, kv_heads: int, new: int) -> None:
    """In one pass, and `new` tokens at a time after contexts of several lengths."""
    ours = model_of(heads, kv_heads)
    generator = torch.Generator().manual_seed(new)
    theirs = in_place_of(ours, partial(published, generator=generator))
    ids = torch.randint(61, (2, 47), generator=generator)
    expected = theirs(ids)
    torch.testing.assert_close(ours(ids), expected, **TOLERANCE)
    for context in torch.randint(1, 30, (3,), generator=generator).tolist():
        pieces = [ids[:, :context], *ids[:, context:].split(new, 1)]
        torch.testing.assert_close(our_steps(ours, pieces), expected, **TOLERANCE)
    torch.testing.assert_close(our_steps(ours, pieces_of(ids, [])), expected, **TOLERANCE)


def test_state_is_a_row_for_each_kv_head_and_half_a_head() -> None:
    spec = model_of(4, 2).state_specs()[0]
    assert [(t.name, t.shape, t.shards) for t in spec.rows] == [
        ("tied", (2, 8), 2), ("key", (4,), 1),
    ]  # fmt: skip


def test_defaults_are_the_heads_of_gqa() -> None:
    config = TiedConfig.at(SCALES["8b"], {})
    assert (config.n_heads, config.kv_heads, config.head_dim) == (32, 8, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 6}, "head_dim=6 is not divisible by 4"),
        ({"kv_heads": 3}, "n_heads=4 is not divisible by kv_heads=3"),
        ({"kv_heads": 0}, "kv_heads=0 must be at least 1"),
    ],
)
def test_impossible_shapes_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TiedConfig.at(SCALES["tiny"], options)
