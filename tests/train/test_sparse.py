"""Weights that become zero: which ones, in which matrices, and that they stay zero."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.layers import Projection
from archs.registry import ModelSpec
from archs.storage import runs, store
from archs.weights import WeightFormat
from tests.train.pruning import CASES, SCALE, Case, Text, text
from train.checkpoint import load_model
from train.loop import CHECKPOINT_NAME, train
from train.observe import observe
from train.recipe import Recipe
from train.sparse import Sparsity, kept_zero, sparsify

ARCHS = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def named(name: str) -> Sparsity:
    return Sparsity.named(name)


def gate_rows(projection: Projection) -> Tensor:
    return torch.cat([torch.full((size,), gates) for gates, size in runs(projection)])


@ARCHS
@pytest.mark.parametrize("name", ["2:4-magnitude", "2:4-wanda", "0.5-magnitude", "1/4-wanda"])
def test_zeros_lie_where_they_should(case: Case, name: str) -> None:
    model, plain = case.spec.build(), case.spec.build()
    plan = named(name)
    masks = sparsify(model, plan, text())
    pruned = 0
    for at, projection in model.named_modules():
        if not isinstance(projection, Projection):
            continue
        weight, before = projection.weight, plain.get_parameter(f"{at}.weight")
        gates = gate_rows(projection)
        if not at.startswith("blocks") or projection.plain or bool(gates.all()):
            assert torch.equal(weight, before) and f"{at}.weight" not in masks
            continue
        mask = masks[f"{at}.weight"]
        pruned += 1
        assert torch.equal(weight, before * mask) and bool(mask[gates].all())
        rows = mask[~gates]
        if plan.zeros is None:
            assert set(rows.unflatten(1, (-1, 4)).sum(-1).unique().tolist()) == {2}
        else:
            zeros = round(plan.zeros * rows.shape[1])
            assert set((~rows).sum(1).unique().tolist()) == {zeros}
    assert pruned == len(masks) and pruned >= 3 * len(model.layers)
    assert torch.equal(model.embedding.weight, plain.embedding.weight)


def test_wandas_rule_looks_at_inputs_and_magnitude_does_not() -> None:
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0], [-1.0, 2.0, -3.0, 4.0]])
    norms = torch.tensor([1.0, 1.0, 10.0, 1.0])
    plan = named("2:4-wanda")
    assert plan.kept(weight.abs()).tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    # 4, 3, 20, 1 and 1, 2, 30, 4.
    assert plan.kept(weight.abs() * norms).tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    # Rows are compared alone: the first is small throughout and keeps as many.
    small = torch.stack((weight[0] / 100, weight[1])).abs()
    assert named("0.75-magnitude").kept(small).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_the_inputs_are_those_of_the_model_as_it_is_pruned() -> None:
    spec, plan, ids = Case("gqa", "gqa").spec, named("0.5-wanda"), text()
    model, plain = spec.build(), spec.build()
    masks = sparsify(model, plan, ids)
    whole, pruned = observe(plain, ids).projections, observe(model, ids).projections

    def mask(name: str, seen: object) -> Tensor:
        weight = plain.get_parameter(f"{name}.weight")
        return plan.kept(weight.abs().double() * seen[name][0].squares.sqrt())  # type: ignore[index]

    assert torch.equal(mask("blocks.0.mixer.qkv", whole), masks["blocks.0.mixer.qkv.weight"])
    third = "blocks.3.mixer.qkv"
    assert torch.equal(mask(third, pruned), masks[f"{third}.weight"])
    assert not torch.equal(mask(third, whole), masks[f"{third}.weight"])


@pytest.mark.parametrize("arch", ["gqa", "cla", "mla", "gdn", "mamba1", "linear"])
@pytest.mark.parametrize("share", ["2:4", "0.5"])
def test_wanda_loses_less_than_magnitude_where_inputs_are_unlike(arch: str, share: str) -> None:
    spec, ids = Case(arch, arch).spec, text(32)

    def lost(rule: str) -> float:
        model = spec.build(seed=3)
        with torch.no_grad():
            # Channels of unlike sizes that move together, as those of trained models do.
            model.embedding.weight[:, 1::5] += 0.5 * model.embedding.weight[:, ::5]
            for block in model.layers:
                block.norm_mixer.weight[::7] *= 8
                block.norm_mlp.weight[::5] *= 8  # type: ignore[union-attr]
            before = model(ids)
            sparsify(model, named(f"{share}-{rule}"), ids)
            return float((model(ids) - before).norm() / before.norm())

    assert lost("wanda") < 0.9 * lost("magnitude")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_zeros_stay_zero_through_training(optimizer: str, tmp_path: Path) -> None:
    scale = SCALE.with_options({"n_layers": 2})
    spec = ModelSpec(arch="gqa", scale=scale, hidden=64)
    recipe = Recipe(
        steps=6, batch=2, seq_len=12, optimizer=optimizer, learning_rate=1e-2, checkpoint_every=0
    )  # type: ignore[arg-type]

    def trained(folder: str, held: bool) -> tuple[Model, dict[str, Tensor]]:
        model = spec.build()
        masks = sparsify(model, named("2:4-magnitude"))
        started = {name: p.detach().clone() for name, p in model.named_parameters()}
        if held:
            with kept_zero(model, masks):
                result = train(model, Text(), recipe, tmp_path / folder, spec=spec)
        else:
            result = train(model, Text(), recipe, tmp_path / folder, spec=spec)
        assert result.status == "ok"
        for name, mask in masks.items():
            assert not torch.equal(model.get_parameter(name)[mask], started[name][mask])
        return model, masks

    model, masks = trained("held", True)
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    loaded = load_model(tmp_path / "held" / CHECKPOINT_NAME)
    assert all(bool((loaded.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    # Without it they do not, and nothing is left of it: the next run is free.
    free, masks = trained("free", False)
    assert any(bool((free.get_parameter(name)[~mask] != 0).any()) for name, mask in masks.items())


def test_weights_that_are_gone_get_no_gradient_and_are_set_to_zero_at_once() -> None:
    model = Case("gqa", "gqa").spec.build()
    masks = sparsify(Case("gqa", "gqa").spec.build(), named("0.5-magnitude"))
    with kept_zero(model, masks):
        model(text()).square().mean().backward()
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            assert bool((parameter[~mask] == 0).all())
            assert parameter.grad is not None and bool((parameter.grad[~mask] == 0).all())
            assert bool((parameter.grad[mask] != 0).any())
        model.zero_grad()
    model(text()).square().mean().backward()
    weight = model.get_parameter("blocks.0.mixer.qkv.weight")
    assert weight.grad is not None
    assert bool((weight.grad[~masks["blocks.0.mixer.qkv.weight"]] != 0).any())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("half-wanda", "sparsity 'half-wanda' is not SHARE-RULE or 2:4-RULE; write 0.5-magnitude"),
        ("", "sparsity '' is not SHARE-RULE"),
        ("1/0-wanda", "is not SHARE-RULE"),
        ("1-wanda", "zeros=1 must be a share between 0 and 1, both excluded, as in 0.5-wanda"),
        ("0-magnitude", "zeros=0 must be a share"),
        ("0.5-wands", r"Unknown rule of sparsity 'wands'. Did you mean 'wanda'\?"),
        ("0.5", "Unknown rule of sparsity ''"),
    ],
)
def test_sparsities_that_say_nothing_sensible_are_refused(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        named(name)


def test_sparsities_read_back_as_they_are_written() -> None:
    for name in ("2:4-wanda", "0.5-magnitude", "0.25-wanda"):
        assert str(named(name)) == name


def test_what_cannot_be_pruned_is_refused_and_left_alone() -> None:
    case = Case("gqa", "gqa")
    model = case.spec.build()
    with pytest.raises(UserError, match=r"'0.5-wanda' compares weights on calibration text; give"):
        sparsify(model, named("0.5-wanda"))
    with pytest.raises(UserError, match="vocab_size is 61"):
        sparsify(model, named("0.5-wanda"), torch.full((1, 4), 99))
    with pytest.raises(UserError, match="weights stored as int8 cannot be pruned"):
        sparsify(store(case.spec.build(), WeightFormat.named("int8")), named("0.5-magnitude"))
    odd = ModelSpec(arch="gqa", scale=SCALE, hidden=22).build()
    with pytest.raises(UserError, match=r"\[1, 22\] has rows that four does not divide.*take 0.5-"):
        sparsify(odd, named("2:4-magnitude"))
    assert all(bool((p != 0).all()) for p in odd.parameters())
    masks = sparsify(case.spec.build(), named("0.5-magnitude"))
    with (
        pytest.raises(UserError, match=r"mask blocks.0.mlp.gate_up.weight .* fits no parameter"),
        kept_zero(odd, masks),
    ):
        pass
