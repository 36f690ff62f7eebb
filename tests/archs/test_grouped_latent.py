"""`grouped_latent` equals grouped latent attention by its definition (arXiv 2505.21487), parallel
and in steps, and in one group `mla`; its two forms are the same function.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.backbone import Model
from archs.errors import UserError
from archs.grouped_latent import GroupedLatentAttention, GroupedLatentConfig
from archs.mixer import Mixer
from archs.registry import ModelSpec
from archs.sizes import SCALES, Scale
from archs.state import Seen
from kernels.attention.torch import FLOP_FORMULAS
from tests.archs.hf import interleaved, our_steps, pieces_of
from tests.archs.published import half_split, in_place_of, normed, random_matrix, softmax_attention

SHAPES = [
    pytest.param(
        2, {"rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 6, "groups": 1}, id="one"
    ),
    pytest.param(
        4, {"rank": 12, "nope_dim": 8, "rope_dim": 6, "v_dim": 5, "groups": 2}, id="two"
    ),
    pytest.param(
        4, {"rank": 20, "nope_dim": 4, "rope_dim": 2, "v_dim": 9, "groups": 4, "q_rank": 7},
        id="four-q-latent",
    ),
    pytest.param(
        6, {"rank": 26, "nope_dim": 5, "rope_dim": 4, "v_dim": 6, "groups": 2, "q_rank": 11},
        id="odd-rank-q-latent",
    ),
]  # fmt: skip
#: Rotary angles are float32, and so are weights of single queries.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def model_of(heads: int, options: dict[str, Any], arch: str = "grouped_latent") -> Model:
    scale = Scale(name="t", d_model=heads * 8, n_layers=2, head_dim=8, vocab_size=61, seq_len=64)
    spec = ModelSpec(arch=arch, scale=scale, hidden=24, overrides={arch: options})
    return spec.build(dtype=torch.float64).eval()


def published(mixer: Mixer, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Random weights in the layout of the published code, copied into ours, and its function."""
    assert isinstance(mixer, GroupedLatentAttention)
    c = mixer.config
    heads, per_group, rank = c.n_heads, c.n_heads // c.groups, c.rank // c.groups
    width = mixer.out.weight.shape[0]
    matrix = partial(random_matrix, generator=generator)
    ones = partial(torch.rand, generator=generator, dtype=torch.float64)
    query_width = width if c.q_rank is None else c.q_rank
    w_q = matrix(heads * (c.nope_dim + c.rope_dim), query_width)
    w_latents = [matrix(rank, width) for _ in range(c.groups)]
    norms = [1 + ones(rank) for _ in range(c.groups)]
    w_key, w_out = matrix(c.rope_dim, width), matrix(width, heads * c.v_dim)
    w_ups = [matrix(per_group * (c.nope_dim + c.v_dim), rank) for _ in range(c.groups)]
    plain, turning = (
        part.flatten(0, 1)
        for part in w_q.unflatten(0, (heads, -1)).split((c.nope_dim, c.rope_dim), 1)
    )
    queries = torch.cat((plain, interleaved(turning, c.rope_dim)))
    rest = torch.cat((interleaved(w_key, c.rope_dim), *w_latents))
    with torch.no_grad():
        if mixer.q_up is None or mixer.q_norm is None:
            mixer.down.weight.copy_(torch.cat((queries, rest)))
        else:
            w_down, q_norm = matrix(query_width, width), 1 + ones(query_width)
            mixer.down.weight.copy_(torch.cat((w_down, rest)))
            mixer.q_norm.weight.copy_(q_norm)
            mixer.q_up.weight.copy_(queries)
        mixer.kv_norm.weight.copy_(torch.cat(norms))
        for up, theirs in zip(mixer.kv_ups, w_ups, strict=True):
            by_head = theirs.unflatten(0, (per_group, -1)).split((c.nope_dim, c.v_dim), 1)
            up.weight.copy_(torch.cat([part.flatten(0, 1) for part in by_head]))
        mixer.out.weight.copy_(w_out)

    def function(x: Tensor) -> Tensor:
        source = x if c.q_rank is None else normed(x @ w_down.T, q_norm, c.q_eps)
        q, rotary_key, outputs = source @ w_q.T, half_split(x @ w_key.T), []
        for g in range(c.groups):
            latent = normed(x @ w_latents[g].T, norms[g], c.kv_eps)
            raised = (latent @ w_ups[g].T).unflatten(-1, (per_group, -1))
            for h in range(per_group):
                plain_key, value = raised[:, :, h].split((c.nope_dim, c.v_dim), -1)
                query = q.unflatten(-1, (heads, -1))[:, :, g * per_group + h]
                plain_query, turning = query.split((c.nope_dim, c.rope_dim), -1)
                outputs.append(
                    softmax_attention(
                        torch.cat((plain_query, half_split(turning)), -1),
                        torch.cat((plain_key, rotary_key), -1),
                        value,
                    )
                )
        return torch.cat(outputs, -1) @ w_out.T

    return function


@pytest.mark.parametrize(("heads", "options"), SHAPES)
@pytest.mark.parametrize("new", [1, 2, 4, 17])
@torch.inference_mode()
def test_model_equals_the_definition(heads: int, options: dict[str, int], new: int) -> None:
    """In one pass, and `new` tokens at a time after contexts of several lengths."""
    ours = model_of(heads, options)
    generator = torch.Generator().manual_seed(new)
    theirs = in_place_of(ours, partial(published, generator=generator))
    ids = torch.randint(61, (2, 47), generator=generator)
    expected = theirs(ids)
    torch.testing.assert_close(ours(ids), expected, **TOLERANCE)
    for context in torch.randint(1, 30, (3,), generator=generator).tolist():
        pieces = [ids[:, :context], *ids[:, context:].split(new, 1)]
        torch.testing.assert_close(our_steps(ours, pieces), expected, **TOLERANCE)
    torch.testing.assert_close(our_steps(ours, pieces_of(ids, [])), expected, **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 6},
        {"rank": 13, "nope_dim": 5, "rope_dim": 4, "v_dim": 9, "q_rank": 7},
        {"rank": 9, "nope_dim": 7, "rope_dim": 3, "v_dim": 5, "positions": False},
    ],
    ids=["plain", "q-latent", "no-positions"],
)
@torch.inference_mode()
def test_one_group_is_mla(options: dict[str, Any]) -> None:
    mla, ours = model_of(3, options, "mla"), model_of(3, options | {"groups": 1})
    weights = {name.replace("kv_up.", "kv_ups.0."): p for name, p in mla.state_dict().items()}
    ours.load_state_dict(weights)
    ids = torch.randint(61, (2, 40))
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(ours(ids), mla(ids), **close)
    for new in (1, 2, 4):
        pieces = [ids[:, :11], *ids[:, 11:].split(new, 1)]
        torch.testing.assert_close(our_steps(ours, pieces), our_steps(mla, pieces), **close)


@pytest.mark.parametrize(("heads", "options"), SHAPES)
@pytest.mark.parametrize(("new", "past"), [(1, 30), (3, 17), (9, 1), (20, 33), (40, 2), (7, 0)])
def test_forms_agree_and_the_cheaper_one_is_taken(
    heads: int, options: dict[str, int], new: int, past: int
) -> None:
    mixer = model_of(heads, options).layers[0].mixer
    assert isinstance(mixer, GroupedLatentAttention)
    c, rows = mixer.config, past + new
    generator = torch.Generator().manual_seed(new)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    q_nope, q_rope = normal(2, new, heads, c.nope_dim), normal(2, new, heads, c.rope_dim)
    mask = torch.ones(1, 1, new, rows, dtype=torch.bool).tril(past)
    latents = Seen(normal(2, c.groups, rows, c.group_rank), mask, False)
    keys = Seen(normal(2, rows, c.rope_dim), mask, False)
    outputs, flops = [], []
    for form in (mixer._by_absorbing, mixer._by_expanding):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as count:
            outputs.append(form(q_nope, q_rope, latents, keys))
        flops.append(count.get_total_flops())
    torch.testing.assert_close(outputs[0], outputs[1], **TOLERANCE)
    assert c.absorbs(new, rows) is (new == 1 or flops[0] < flops[1])


def test_state_is_a_latent_for_each_group_and_one_key() -> None:
    spec = ModelSpec(arch="grouped_latent", scale=SCALES["tiny"]).outline().state_specs()[0]
    assert [(t.name, t.shape, t.shards) for t in spec.rows] == [
        ("latent", (2, 32), 2), ("key", (16,), 1),
    ]  # fmt: skip
    (mla,) = ModelSpec(arch="mla", scale=SCALES["tiny"]).outline().state_specs()[0].rows
    assert sum(t.nbytes for t in spec.rows) == mla.nbytes


def test_defaults_are_two_groups_and_else_those_of_mla() -> None:
    config = GroupedLatentConfig.at(SCALES["8b"], {})
    assert (config.groups, config.group_rank, config.q_rank, config.rope_dim) == (2, 256, 1536, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 3}, "n_heads=4 is not divisible by groups=3"),
        ({"rank": 33}, "rank=33 is not divisible by groups=2"),
        ({"groups": 0}, "groups=0 must be at least 1"),
        ({"rope_dim": 3}, "rope_dim=3 is odd"),
    ],
)
def test_impossible_shapes_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GroupedLatentConfig.at(SCALES["tiny"], options)
