"""Structured pruning: what goes is what does least, and what is left is an ordinary model."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backbone import Model
from archs.errors import UserError
from archs.layers import Projection
from archs.narrow import axes_of, teams, without_layers
from tests.archs.test_axes import EVERY
from tests.train.pruning import CASES, SCALE, Case, grown, kill, spec_of, text
from train.importance import channel_importance, least_influential, unit_importance
from train.observe import observe
from train.prune import Cut, Plan, prune

ARCHS = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def silence(model: Model, layers: list[int]) -> None:
    """Layers that add nothing to the stream."""
    with torch.no_grad():
        for layer in layers:
            for module in model.layers[layer].modules():
                if isinstance(module, Projection) and module.residual:
                    module.weight.zero_()


def quiet_channels(model: Model, kept: Tensor) -> None:
    """A stream whose other channels are always zero."""
    dead = torch.ones(SCALE.d_model, dtype=torch.bool).index_fill_(0, kept, False)
    with torch.no_grad():
        model.embedding.weight[:, dead] = 0
        for module in model.modules():
            if isinstance(module, Projection) and module.residual:
                module.weight[dead] = 0


def same(model: Model, smaller: Model, ids: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(smaller(ids), model(ids), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("case", "name"), EVERY)
def test_dead_units_go_and_nobody_notices(case: Case, name: str) -> None:
    model, ids = grown(case.spec), text()
    before = [p.clone() for p in model.parameters()]
    kill(model, name)
    dead = [p.clone() for p in model.parameters()]
    smaller, spec = prune(model, case.spec, Plan.named(f"{name}:0.5"), ids)
    # Text of calibration and other text alike.
    same(model, smaller, ids)
    same(model, smaller, text(2, 31, seed=9))
    assert [p.shape for p in spec.outline().parameters()] == [p.shape for p in smaller.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(dead, model.parameters(), strict=True))
    assert any(p.shape != q.shape for p, q in zip(before, smaller.parameters(), strict=True))


@ARCHS
def test_dead_channels_of_the_stream_go_and_nobody_notices(case: Case) -> None:
    model, ids = grown(case.spec), text()
    kept = torch.randperm(SCALE.d_model, generator=torch.Generator().manual_seed(2))[:24]
    quiet_channels(model, kept)
    smaller, spec = prune(model, case.spec, Plan.named("width:0.75"), ids)
    same(model, smaller, text(3, 17, seed=4))
    assert spec.scale.d_model == 24 and smaller.embedding.weight.shape[1] == 24
    assert spec.norm_eps == pytest.approx(1e-5 * 32 / 24)
    assert smaller.state_bytes(30) <= model.state_bytes(30)


@ARCHS
def test_layers_that_do_nothing_go_and_nobody_notices(case: Case) -> None:
    model, ids = grown(case.spec), text()
    gone = teams(model)[-1] if len(teams(model)[0]) > 1 else [1, 2]
    silence(model, gone)
    smaller, spec = prune(model, case.spec, Plan.named("layers:2"), ids)
    same(model, smaller, ids)
    assert len(smaller.layers) == spec.scale.n_layers == 2
    kept = [layer.mixer for i, layer in enumerate(case.spec.layer_specs()) if i not in gone]
    assert [layer.mixer for layer in spec.layers] == kept


def test_layers_of_little_influence_go_first() -> None:
    """1 - mean cosine of the streams, by hand; then the choice of whole teams."""
    model, ids = grown(Case("gqa", "gqa").spec), text()
    x, residual = model.embed(ids), None
    expected = []
    with torch.no_grad():
        for block in model.layers:
            before = x if residual is None else x + residual
            x, residual = block(x, residual, {})
            expected.append(1 - F.cosine_similarity(before, x + residual, dim=-1).mean())
    influence = observe(model, ids).influence
    torch.testing.assert_close(influence, torch.stack(expected), atol=1e-12, rtol=1e-12)
    smaller, _ = without_layers(model, spec_of("gqa"), [int(influence.argmin())])
    pruned, spec = prune(model, spec_of("gqa"), Plan.named("layers:1"), ids)
    pairs = zip(smaller.parameters(), pruned.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert spec.scale.n_layers == 3


def test_teams_are_chosen_by_what_they_do_together() -> None:
    influence = torch.tensor([0.1, 0.2, 0.9, 0.05, 0.3])
    alone = [[0], [1], [2], [3], [4]]
    assert least_influential(influence, alone, 2) == [0, 3]
    # Layers 2 and 3 go together, so that 0 and 1 are the cheaper two.
    assert least_influential(influence, [[0], [1], [2, 3], [4]], 2) == [0, 1]
    assert least_influential(influence, [[0, 1], [2, 3], [4]], 3) == [0, 1, 4]
    with pytest.raises(UserError, match=r"2 of 4 layers cannot be removed: .* can be: 1, 3"):
        least_influential(influence[:4], [[0, 1, 2], [3]], 2)


def test_units_are_weighed_by_activations_and_the_columns_that_read_them() -> None:
    model, ids = grown(spec_of("gqa")), text()
    seen = observe(model, ids)
    block = model.layers[0]
    with torch.no_grad():
        x = model.embed(ids)
        mixed = block.norm_mixer(x)
        x = x + block.mixer(mixed)
        assert block.mlp is not None and block.norm_mlp is not None
        gate, up = (block.norm_mlp(x) @ block.mlp.gate_up.weight.T).chunk(2, -1)
        units = (F.silu(gate) * up).flatten(0, 1)
        size = units.square().mean(0).sqrt() * block.mlp.down.weight.norm(dim=0)
    axis = axes_of(block)["mlp"]
    found = unit_importance(model, 0, axis, seen)
    torch.testing.assert_close(found, size, atol=1e-10, rtol=1e-10)
    # A channel of keys works with that of the queries: both count.
    delta = grown(spec_of("gdn"))
    seen_too = observe(delta, ids)
    axis = axes_of(delta.layers[0])["key_dim"]
    made = seen_too.projections["blocks.0.mixer.q_k_v_z_b_a"][1].mean_square.sqrt()
    torch.testing.assert_close(unit_importance(delta, 0, axis, seen_too), made[:16] * made[16:32])
    # A head's is that of its channels, in squares.
    heads = unit_importance(model, 0, axes_of(block)["heads"], seen)
    channels = seen.projections["blocks.0.mixer.out"][0].mean_square
    weighed = channels * block.mixer.get_parameter("out.weight").square().sum(0)
    torch.testing.assert_close(heads, weighed.view(4, 8).sum(1).sqrt())
    # Mean absolute normed activations, of all nine norms.
    assert len(seen.normed) == 9
    first = seen.normed["blocks.0.norm_mixer"]
    torch.testing.assert_close(first.magnitudes / first.rows, mixed.abs().mean((0, 1)))
    total = torch.stack([s.magnitudes / s.rows for s in seen.normed.values()]).sum(0)
    torch.testing.assert_close(channel_importance(seen), total)


def test_what_is_left_are_the_units_of_most_importance_of_each_group() -> None:
    """Of each head's value channels, and alike in the layers that share keys and values."""
    model, ids = grown(spec_of("gdn")), text()
    smaller, _ = prune(model, spec_of("gdn"), Plan.named("value_dim:0.5"), ids)
    axis = axes_of(model.layers[0])["value_dim"]
    scores = unit_importance(model, 0, axis, observe(model, ids)).view(4, 8)
    best = scores.argsort(1, descending=True)[:, :4].sort(1).values
    rows = model.layers[0].mixer.get_parameter("q_k_v_z_b_a.weight")[32:64].view(4, 8, -1)
    kept = smaller.layers[0].mixer.get_parameter("q_k_v_z_b_a.weight")[32:48].view(4, 4, -1)
    assert torch.equal(kept, torch.stack([r[b] for r, b in zip(rows, best, strict=True)]))

    case = spec_of("cla")
    model = grown(case)
    with torch.no_grad():
        # The owner alone would keep the first group, both together keep the second.
        model.layers[0].mixer.get_parameter("out.weight")[:, :16] *= 2
        model.layers[1].mixer.get_parameter("out.weight")[:, 16:] *= 20
    smaller, _ = prune(model, case, Plan.named("kv_heads:0.5"), ids)
    for layer in (0, 1):
        before, after = (
            m.layers[layer].mixer.get_parameter("out.weight") for m in (model, smaller)
        )
        assert torch.equal(before[:, 16:], after)


@pytest.mark.parametrize(
    ("arch", "name", "reader"),
    [("mla", "rank", "kv_up"), ("mamba2", "heads", "out"), ("linear", "value_dim", "out")],
)
def test_norms_over_fewer_channels_keep_the_size_of_what_they_give(
    arch: str, name: str, reader: str
) -> None:
    model, ids = grown(spec_of(arch)), text()
    smaller, _ = prune(model, spec_of(arch), Plan.named(f"{name}:0.5"), ids)
    # The first layer reads the same in both; compared are the columns that stay.
    size = [
        (m, observe(m, ids).projections[f"blocks.0.mixer.{reader}"][0].squares)
        for m in (model, smaller)
    ]
    (_, large), (_, small) = size
    assert len(small) == len(large) // 2
    weight = smaller.get_parameter(f"blocks.0.mixer.{reader}.weight")
    whole = model.get_parameter(f"blocks.0.mixer.{reader}.weight")
    if arch == "linear":
        norm = model.layers[0].mixer.get_parameter("norm_weight").repeat(4)
        whole, large = whole * norm, large / norm.square()
    kept = [int((whole - column[:, None]).abs().sum(0).argmin()) for column in weight.T]
    torch.testing.assert_close(small.sum(), large[kept].sum())


@pytest.mark.parametrize(
    ("arch", "plan", "says"),
    [
        (
            "gqa",
            "rank:0.5",
            "Unknown axis of gqa 'rank'. Available: heads, kv_heads, layers, mlp, ",
        ),
        ("mamba1", "heads:0.5", "Unknown axis of mamba1 'heads'."),
        ("mqa", "state:0.5", "'state:0.5' keeps 0.5 of 1 kv_heads units, .* leave this axis as it"),
        ("gqa", "mlp:0.3", "keeps 7.2 of 24 mlp units, .* take mlp:7/24 or mlp:1/3"),
        ("gqa", "heads:1/4", "keeps 0.5 of 2 heads units in each of 2 groups, .*take heads:1/2"),
        ("gqa", "width:1/3", "keeps 10.6667 of 32 channels of the model's width"),
        ("gqa", "layers:4", "4 of 4 layers cannot be removed: .* can be: 1, 2, 3"),
        ("cla", "layers:1", "1 of 4 layers cannot be removed: .* can be: 2"),
        ("linear", "value_dim:0.5,value_dim:1/8", "names 'value_dim' twice; name it once"),
    ],
)
def test_plans_that_do_not_fit_are_refused(arch: str, plan: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        prune(spec_of(arch).build(), spec_of(arch), Plan.named(plan), text())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("", "cut '' is not AXIS:AMOUNT; write layers:2"),
        ("heads", "cut 'heads' is not AXIS:AMOUNT"),
        ("heads:half", "cut 'heads:half' is not AXIS:AMOUNT"),
        ("heads:1/0", "cut 'heads:1/0' is not AXIS:AMOUNT"),
        ("heads:1", "'heads:1' must keep a share between 0 and 1, both excluded, as in heads:0.5"),
        ("mlp:0", "'mlp:0' must keep a share between 0 and 1"),
        ("mlp:-0.5", "'mlp:-0.5' must keep a share between 0 and 1"),
        ("layers:0", "'layers:0' must remove a whole number of layers, at least 1, as in layers:2"),
        ("layers:0.5", "'layers:0.5' must remove a whole number of layers"),
        ("mlp:0.5,mlp:0.5", "axes of a plan names 'mlp' twice; name it once"),
    ],
)
def test_plans_that_say_nothing_sensible_are_refused(plan: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Plan.named(plan)


def test_plans_read_back_as_they_are_written() -> None:
    for name in ("layers:2", "heads:0.5,mlp:1/3", "width:0.75,state:0.5"):
        assert str(Plan.named(name)) == name
    assert Plan(cuts=(Cut.named("mlp:2/4"),)) == Plan.named("mlp:0.5")


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (torch.zeros(0, 4, dtype=torch.long), r"text is \[0, 4\]; give token ids \[B, T\]"),
        (torch.zeros(4, dtype=torch.long), r"text is \[4\]; give token ids"),
        (torch.full((2, 4), 61), "holds tokens 61 to 61, the model's vocab_size is 61; take text"),
    ],
)
def test_text_that_is_none_is_refused(ids: Tensor, says: str) -> None:
    with pytest.raises(UserError, match=says):
        prune(spec_of("gqa").build(), spec_of("gqa"), Plan.named("layers:1"), ids)


def test_a_model_that_is_watched_is_left_as_it_was() -> None:
    model, ids = spec_of("mla").build(), text()
    modules = [type(m) for m in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        before = model(ids)
    prune(model, spec_of("mla"), Plan.named("layers:1,width:0.5,rank:0.5"), ids)
    assert [type(m) for m in model.modules()] == modules
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids), before)
