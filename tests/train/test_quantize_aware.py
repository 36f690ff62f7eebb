"""Training with rounded weights: what products see, where gradients go, and that it helps."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from archs.backbone import cast
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.weights import WeightFormat
from tests.train.test_loop import RECIPE, SCALE, SPEC, Counting
from train.compress import compress
from train.heads import loss_of
from train.loop import train
from train.quantize_aware import seen_rounded


@pytest.mark.parametrize("weights", ["int2-g32,head:bfloat16", "int8,head:bfloat16"])
@pytest.mark.parametrize("arch", ["gqa", "gdn", "mamba1", "mla"])
def test_products_see_the_numbers_that_will_be_stored(arch: str, weights: str) -> None:
    stored = WeightFormat.named(weights)
    model = ModelSpec(arch=arch, scale=SCALE, hidden=32).build()
    # What is stored in bfloat16 is no matter here.
    model = cast(cast(model, torch.bfloat16), torch.float32)
    ids = torch.randint(SCALE.vocab_size, (2, 12))
    plain = model(ids)
    with seen_rounded(model, stored):
        seen = model(ids)
    assert torch.equal(model(ids), plain) and not torch.equal(seen, plain)
    with torch.no_grad():
        kept = cast(compress(deepcopy(model), stored), torch.float32)(ids)
    torch.testing.assert_close(seen, kept, rtol=1e-5, atol=1e-5)


def test_gradients_go_to_the_weights_as_if_nothing_were_rounded() -> None:
    model = SPEC.build()
    projection = model.layers[0].mixer.out
    x = torch.randn(3, projection.in_features)
    with seen_rounded(model, WeightFormat.named("int3-g32")):
        y = projection(x)
        y.sum().backward()
    torch.testing.assert_close(projection.weight.grad, x.sum(0).expand_as(projection.weight))


def test_training_rounded_loses_less_than_rounding_afterwards(tmp_path: Path) -> None:
    stored = WeightFormat.named("int2-g32,head:bfloat16")
    parent = SPEC.build()
    train(parent, Counting(), RECIPE, tmp_path / "parent", spec=SPEC)
    losses = {}
    for name in ("plain", "rounded"):
        model = deepcopy(parent)
        if name == "rounded":
            with seen_rounded(model, stored):
                train(model, Counting(), RECIPE, tmp_path / name, spec=SPEC)
        else:
            train(model, Counting(), RECIPE, tmp_path / name, spec=SPEC)
        model = cast(compress(model.eval(), stored), torch.float32)
        with torch.no_grad():
            inputs, targets = Counting().batch_at(99)
            losses[name] = float(loss_of(RECIPE)(model, inputs, targets).next_token)
    assert losses["rounded"] < losses["plain"]


def test_groups_wider_than_a_row_are_refused_before_training() -> None:
    model = ModelSpec(arch="gqa", scale=get_scale("nano")).build()
    with (
        pytest.raises(UserError, match="groups of 64 columns, wider than the rows"),
        seen_rounded(model, WeightFormat.named("int4-g64")),
    ):
        pass
    assert all(
        m.view is None for m in model.modules() if hasattr(m, "view") and hasattr(m, "sizes")
    )
