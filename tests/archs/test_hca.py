"""`hca` equals DeepSeek-V4's heavily compressed attention; a group's part forks and rolls back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from archs.backbone import Model
from archs.backends import NoFormError
from archs.cost import Step
from archs.errors import UserError
from archs.hca import HeavilyCompressedAttention, HeavilyCompressedConfig
from archs.mixer import Place
from archs.ops.pooling import append_index, append_tokens, attend_pooled
from archs.registry import ModelSpec
from archs.sizes import SCALES
from infer.engine import Engine
from tests.archs.deepseek_v4 import Theirs, copy_compressed, our_pieces
from tests.archs.hf import TOLERANCE
from tests.archs.test_mla import small_scale

SHAPES = [
    pytest.param(
        {
            "n_heads": 4, "dim": 12, "rope_dim": 4, "q_rank": 9, "out_groups": 2, "out_rank": 5,
            "every": 5, "window": 7,
        },
        id="grouped",
    ),
    pytest.param(
        {
            "n_heads": 3, "dim": 8, "rope_dim": 8, "q_rank": 6, "out_groups": 1, "out_rank": 7,
            "every": 16, "window": 3,
        },
        id="all-channels-rotary",
    ),
    pytest.param(
        {
            "n_heads": 2, "dim": 6, "rope_dim": 2, "q_rank": 4, "out_groups": 2, "out_rank": 3,
            "every": 1, "window": 60, "rope_theta": 500.0,
        },
        id="every-token",
    ),
]  # fmt: skip


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize(("batch", "length"), [(1, 43), (3, 43), (2, 1), (1, 63)])
def test_a_pass_and_steps_equal_deepseek_v4(
    options: dict[str, Any], batch: int, length: int
) -> None:
    config, d_model = HeavilyCompressedConfig(**options), 20
    theirs = Theirs("heavily_compressed_attention", d_model, config, seed=batch)
    place = Place(d_model=d_model, n_layers=1, layer=0, siblings=(0,))
    mixer = HeavilyCompressedAttention(config, place)
    copy_compressed(mixer, theirs.attention)
    x = torch.randn(batch, length, d_model)
    expected = theirs(x)
    with torch.inference_mode():
        torch.testing.assert_close(mixer(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
    pieces = [9, 3, 1, 13] if length > 26 else []
    pieces += [1] * (length - sum(pieces))
    stepwise = theirs(x, pieces)
    torch.testing.assert_close(stepwise, expected, rtol=TOLERANCE, atol=TOLERANCE)
    ours = our_pieces(mixer, x, pieces)
    torch.testing.assert_close(ours, stepwise, rtol=TOLERANCE, atol=TOLERANCE)


def grown(**options: Any) -> Model:
    """Two layers in float64, whose sinks and positions in groups are no longer zero."""
    model = ModelSpec(
        arch="hca", scale=small_scale(4), overrides={"hca": {"every": 6, "window": 4, **options}},
        hidden=16,
    ).build(seed=3).double()  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "pool_bias")):
                parameter.normal_(generator=draw)
    return model


@pytest.mark.parametrize("back", range(1, 9))
@pytest.mark.parametrize("held", [11, 12, 13, 17])
@torch.inference_mode()
def test_a_rollback_takes_a_group_back_too(held: int, back: int) -> None:
    """Across a border of groups of six and within one; afterwards other tokens come."""
    model, tokens = grown(), torch.randint(0, 101, (1, 30))
    engine = Engine(model, max_sequences=2, max_context=64, page_size=4, lookback=8)
    slot = engine.store.add()
    engine.extend([slot], tokens[:, :held])
    wrong = (tokens[:, held : held + back] + 1) % 101
    engine.extend([slot], wrong[:, : back // 2 + 1])
    if back // 2 + 1 < back:
        engine.extend([slot], wrong[:, back // 2 + 1 :])
    other = engine.store.fork(slot)
    engine.store.rollback(slot, back)
    for part in tokens[:, held:].split([1, 5, 30 - held - 6], 1):
        got = engine.extend([slot], part)
    expected = model(tokens)
    torch.testing.assert_close(got, expected[:, -got.shape[1] :], rtol=1e-5, atol=1e-5)
    # The fork went on from what was taken back.
    last = engine.extend([other], tokens[:, -1:])
    whole = model(torch.cat((tokens[:, :held], wrong, tokens[:, -1:]), 1))
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-5, atol=1e-5)


# -- bytes --


def test_bytes_at_the_published_shape() -> None:
    """512/128 numbers a token, a window of 128 rows, and a part of one group."""
    published = HeavilyCompressedConfig(
        n_heads=64, dim=512, rope_dim=64, q_rank=1024, out_groups=8, out_rank=1024, every=128,
        window=128,
    )  # fmt: skip
    assert HeavilyCompressedConfig.at(SCALES["8b"], {}) == published
    model = ModelSpec(arch="hca", scale=SCALES["8b"]).outline(torch.bfloat16)
    spec = model.state_specs()[0]
    assert spec.bytes_per_token == 2 * 512 / 128
    assert spec.state_bytes(128 * 1000) == 2 * 512 * (1000 + 128) + 4 * 2 * 512
    cost = model.cost(Step(batch=1, new_tokens=1, context=128 * 1000))
    read = 2 * 512 * (1000 + 128) + 4 * 2 * 512
    assert sum(op.state_read_bytes for op in cost.ops) == 32 * read


def test_defaults_follow_the_trained_length() -> None:
    tiny = HeavilyCompressedConfig.at(SCALES["tiny"], {})
    assert (tiny.every, tiny.window, tiny.dim, tiny.n_heads) == (8, 16, 64, 8)


def test_a_backend_without_a_form_says_so() -> None:
    given: list[Any] = [torch.zeros(1)] * 6
    with pytest.raises(NoFormError, match="over pooled rows has no form for backend 'fla'"):
        attend_pooled(*given, scale=1.0, backend="fla")


@pytest.mark.parametrize("append", [append_tokens, append_index])
def test_pooling_without_a_form_says_so(append: Callable[..., object]) -> None:
    given = [None] * (5 if append is append_tokens else 4)
    with pytest.raises(NoFormError, match="gated pooling has no form for backend 'fla'"):
        append(*given, backend="fla")


def test_a_new_model_starts_without_preference() -> None:
    mixer = ModelSpec(arch="hca", scale=small_scale(4), hidden=16).build().layers[0].mixer
    assert isinstance(mixer, HeavilyCompressedAttention)
    assert not mixer.pool_bias.any() and not mixer.sinks.any()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"every": 0}, "every=0 must be at least 1"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"rope_dim": 5}, "rope_dim=5 must be even, at least 2 and at most dim=64"),
        ({"rope_dim": 66}, "rope_dim=66 must be even"),
        ({"out_groups": 3}, "n_heads=8 is not divisible by out_groups=3"),
        ({"eps": 0.0}, "eps=0.0 must be positive"),
    ],
)
def test_impossible_shapes_are_named(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HeavilyCompressedConfig.at(SCALES["tiny"], option)
