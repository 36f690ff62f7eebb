"""`cla`: `gqa` at group=1; above, sharing layers own no state and read their owner's rows."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.cla import CrossLayerAttention, CrossLayerConfig
from archs.errors import UserError
from archs.gqa import Attention, AttentionConfig
from archs.mixer import Place, Shared
from archs.registry import ModelSpec
from archs.sizes import Scale
from infer.engine import Engine
from tests.archs.hf import our_steps

SCALE = Scale(name="test", d_model=48, n_layers=5, head_dim=8, vocab_size=101, seq_len=64, window=6)


def build(arch: str, **options: Any) -> Model:
    overrides = {name: options for name in ("gqa", "cla") if name in arch and options}
    return ModelSpec(arch=arch, scale=SCALE, overrides=overrides, hidden=37).build(seed=2)


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(length))


def test_group_of_one_equals_gqa() -> None:
    tokens = random_tokens(2, 23)
    gqa, cla = build("gqa"), build("cla", group=1)
    with torch.inference_mode():
        assert torch.equal(gqa(tokens), cla(tokens))
    assert gqa.state_specs() == cla.state_specs()


@pytest.mark.parametrize(
    ("arch", "options", "owners"),
    [
        ("cla", {}, [None, 0, None, 2, None]),
        ("cla", {"group": 3}, [None, 0, 0, None, 3]),
        ("cla", {"group": 9}, [None, 0, 0, 0, 0]),
        ("cla:swa=1:1", {}, [None, None, 0, None, None]),
        ("cla", {"shared_layers": 2}, [None, None, None, 2, 2]),
        ("cla", {"shared_layers": 9}, [None, 0, 0, 0, 0]),
        ("cla:swa=1:1", {"shared_layers": 1}, [None, None, None, None, 2]),
    ],
)
def test_one_layer_owns_the_state_of_those_that_share(
    arch: str, options: dict[str, int], owners: list[int | None]
) -> None:
    model = build(arch, **options)
    specs = model.state_specs()
    assert [s.rows[0].owner for s in specs] == owners
    store = Engine(model, max_context=32).store
    for spec, layer in zip(specs, store.pools.layers, strict=True):
        assert bool(layer.rows) is bool(spec.owned)


def test_sharing_layers_hold_no_key_or_value_weights() -> None:
    model = build("cla")
    owner, sharing = (model.layers[i].mixer for i in (0, 1))
    shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (owner, sharing)]
    assert shapes[0] == {"qkv.weight": (48 + 2 * 16, 48), "out.weight": (48, 48)}
    assert shapes[1] == {"qkv.weight": (48, 48), "out.weight": (48, 48)}


def test_slope_of_the_state_is_one_owner_per_group() -> None:
    slopes = {
        name: sum(s.bytes_per_token for s in build(name).state_specs()) for name in ("gqa", "cla")
    }
    assert slopes["cla"] * 5 == slopes["gqa"] * 3


def test_sharing_layer_attends_from_its_input_to_its_owners_rows() -> None:
    """Against plain attention whose queries see one half of a joined input, its keys the other."""
    config = CrossLayerConfig(n_heads=6, kv_heads=2, head_dim=8)
    places = [Place(d_model=48, n_layers=2, layer=i, siblings=(0, 1)) for i in (0, 1)]
    owner, sharing = (CrossLayerAttention(config, place) for place in places)
    joined = Attention(
        AttentionConfig(n_heads=6, kv_heads=2, head_dim=8),
        Place(d_model=96, n_layers=1, layer=0, siblings=(0,)),
    )
    with torch.no_grad():
        joined.qkv.weight.zero_()
        joined.qkv.weight[:48, :48] = sharing.qkv.weight
        joined.qkv.weight[48:, 48:] = owner.qkv.weight[48:]
        joined.out.weight[:48] = sharing.out.weight
        below, above = torch.randn(2, 2, 19, 48)
        shared: Shared = {}
        owner(below, shared)
        expected = joined(torch.cat((above, below), -1))[..., :48]
        torch.testing.assert_close(sharing(above, shared), expected)


@pytest.mark.parametrize("arch", ["cla", "cla:swa=1:1", "swa:cla=1:2"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("page_size", [1, 8])
def test_any_split_equals_the_parallel_form(arch: str, batch: int, page_size: int) -> None:
    model = build(arch)
    tokens = random_tokens(batch, 39)
    with torch.inference_mode():
        expected = model(tokens)
    draw = random.Random(batch)
    for _ in range(3):
        sizes: list[int] = []
        while sum(sizes) < 39:
            sizes.append(min(39 - sum(sizes), draw.choice([1, 1, 2, 5, 11])))
        stepwise = our_steps(model, tokens.split(sizes, 1), page_size=page_size)
        torch.testing.assert_close(stepwise, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"group": 5}, {"shared_layers": 4}, {"group": 5, "tied_kv": True}]
)
def test_gradients_reach_the_owner_through_sharing_layers(options: dict[str, Any]) -> None:
    model = build("cla", **options)
    owner = model.layers[0].mixer
    assert isinstance(owner, CrossLayerAttention)
    with torch.no_grad():
        # The owner's own output is cut off: its keys and values now act through others only.
        owner.out.weight.zero_()
    model(random_tokens(1, 9)).square().mean().backward()
    grad = owner.qkv.weight.grad
    assert grad is not None
    assert grad[:48].abs().max() == 0
    assert grad[48:].abs().max() > 0


def test_sharing_layer_alone_says_what_it_needs() -> None:
    mixer = build("cla").layers[1].mixer
    with pytest.raises(ValueError, match="layer 1 reads the KV of layer 0"):
        mixer(torch.randn(1, 3, 48))


def test_group_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="group=0 must be at least 1"):
        build("cla", group=0)
