"""What can be made narrower: every axis of every architecture, the stream's width, and layers."""

from pathlib import Path

import pytest
import torch

from archs.axes import Axis, columns, read_by, rows, spans
from archs.cost import Step
from archs.errors import UserError
from archs.narrow import (
    Choice,
    axes_of,
    folded,
    teams,
    without_channels,
    without_layers,
    without_units,
)
from archs.registry import ModelSpec
from archs.storage import store
from archs.weights import WeightFormat
from tests.train.pruning import CASES, SCALE, Case, axes_in, grown, half_of, kill, text

FILES = Path(__file__).parents[1] / "data"
EVERY = [
    pytest.param(case, name, id=f"{case.name}-{name}")
    for case in CASES
    for name in axes_in(case.spec)
    if all(
        axes_of(block)[name].per_group > 1
        for block in case.spec.outline().layers
        if name in axes_of(block)
    )
]


#: Architectures whose rows' channels are bound by two norms and by positions.
ROWS_STAY = {"csa", "hca"}


def test_every_architecture_has_axes_and_every_remembered_kind_shrinks() -> None:
    for case in CASES:
        kinds = {a.kind for block in case.spec.outline().layers for a in axes_of(block).values()}
        assert kinds == ({"width"} if case.arch in ROWS_STAY else {"state", "width"}), case.name
    assert len(EVERY) > 60


@pytest.mark.parametrize(("case", "name"), EVERY)
def test_units_without_weights_leave_nothing_behind(case: Case, name: str) -> None:
    model, ids = grown(case.spec), text()
    alive = kill(model, name)
    choices = [
        Choice(layer=i, axis=axes_of(model.layers[i])[name], units=lives.nonzero()[:, 0])
        for i, lives in alive.items()
    ]
    parent = folded(model, choices)
    with torch.no_grad():
        logits = model(ids)
        torch.testing.assert_close(parent(ids), logits, atol=1e-10, rtol=0)
        smaller, spec = without_units(parent, case.spec, choices)
        for choice in choices:
            if choice.axis.norm:
                # Over fewer channels the same sum of squares has a larger mean.
                norm = smaller.layers[choice.layer].get_parameter(choice.axis.norm)
                norm *= (len(choice.units) / choice.axis.count) ** -0.5
        torch.testing.assert_close(smaller(ids), logits, atol=1e-9, rtol=0)
    shapes = [p.shape for p in smaller.parameters()]
    assert [p.shape for p in spec.outline().parameters()] == shapes


@pytest.mark.parametrize(("case", "name"), EVERY)
def test_costs_and_state_shrink_as_declared(case: Case, name: str) -> None:
    model = case.spec.build()
    choices = [
        Choice(layer=i, axis=axis, units=half_of(axis, 0).nonzero()[:, 0])
        for i, block in enumerate(model.layers)
        if (axis := axes_of(block).get(name)) is not None
    ]
    smaller, _ = without_units(folded(model, choices), case.spec, choices)
    kinds = {choice.axis.kind for choice in choices}
    for context in (1, 40):
        before, after = model.state_bytes(context), smaller.state_bytes(context)
        assert after < before if "state" in kinds else after == before
    step = Step(batch=2, new_tokens=1, context=30)
    for parent, child in zip(model.layers, smaller.layers, strict=True):
        had, has = parent.cost(step), child.cost(step)
        cut = name in axes_of(parent)
        assert (has.weight_bytes < had.weight_bytes) is cut
        assert (has.matrix_flops < had.matrix_flops) is cut
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in smaller.parameters())
    read = model.cost(step).weight_bytes - smaller.cost(step).weight_bytes
    # Norms' weights of latents and the like are read once, as are all others.
    assert gone > 0 and read == 4 * gone


def test_options_follow_what_is_kept() -> None:
    def options(arch: str, name: str, overrides: dict[str, object] | None = None) -> object:
        case = Case(arch, arch, {arch: overrides or {}})
        model = case.spec.build()
        axis = axes_of(model.layers[0])[name]
        choice = Choice(layer=0, axis=axis, units=half_of(axis, 1).nonzero()[:, 0])
        _, spec = without_units(folded(model, [choice]), case.spec, [choice])
        assert spec.layers[1:] == case.spec.spelled_out().layers[1:]
        before, after = case.spec.spelled_out().layers[0], spec.layers[0]
        if name == "mlp":
            return after.hidden
        return {k: v for k, v in after.options.items() if v != before.options[k]}

    assert options("mha", "heads") == {"n_heads": 2, "kv_heads": 2}
    assert options("gqa", "kv_heads") == {"n_heads": 2, "kv_heads": 1}
    assert options("gqa", "heads") == {"n_heads": 2}
    assert options("mqa", "heads") == {"n_heads": 2}
    assert options("mla", "rank") == {"rank": 8, "kv_eps": 2e-6}
    assert options("mla", "query_rank", {"q_rank": 16}) == {"q_rank": 8, "q_eps": 2e-6}
    assert options("dsa", "query_rank", {"q_rank": 16}) == {"q_rank": 8, "q_eps": 2e-6}
    assert options("dsa", "index_heads", {"index_heads": 4}) == {"index_heads": 2}
    assert options("gdn", "heads", {"key_heads": 2}) == {"key_heads": 1, "value_heads": 2}
    assert options("gdn", "value_heads", {"key_heads": 2}) == {"value_heads": 2}
    assert options("gdn", "key_dim") == {"key_dim": 2, "eps": 2e-6}
    assert options("mamba1", "state_dim") == {"state_dim": 8}
    assert options("mamba1", "inner") == {"inner": 32}
    assert options("mamba2", "state_dim", {"groups": 2}) == {"state_dim": 4}
    assert options("mamba2", "heads", {"groups": 2}) == {"n_heads": 4, "eps": 2e-5}
    assert options("mamba2", "head_dim") == {"head_dim": 4, "eps": 2e-5}
    assert options("rwkv7", "key_dim") == {"key_dim": 2}
    assert options("rwkv7", "heads") == {"n_heads": 2}
    assert options("gqa", "mlp") == 12
    spread = Case("linear", "linear").spec.spelled_out().layers[0]
    assert spread.options["exponents"] == []
    (exponents,) = [options("linear", "heads")]
    every = torch.linspace(5.0, 1 + torch.tensor(24.0).log2().item(), 4, dtype=torch.float64)
    assert isinstance(exponents, dict) and exponents["n_heads"] == 2
    assert all(min(abs(every - e)) < 1e-6 for e in exponents["exponents"])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_spec_spelled_out_is_the_same_model(case: Case) -> None:
    spec = case.spec.spelled_out()
    assert spec.spelled_out() == spec
    ids = text(2, 9)
    with torch.no_grad():
        assert torch.equal(spec.build(seed=3)(ids), case.spec.build(seed=3)(ids))


def test_layers_that_share_rows_are_one_team() -> None:
    def of(arch: str, **options: object) -> list[list[int]]:
        return teams(Case(arch, arch, {arch: options} if options else {}).spec.outline())

    assert of("gqa") == [[0], [1], [2], [3]]
    assert of("cla") == [[0, 1], [2, 3]]
    assert of("cla", group=3) == [[0, 1, 2], [3]]
    assert of("cla:gqa=1:1") == [[0, 2], [1], [3]]
    assert of("rwkv7") == [[0], [1], [2], [3]]
    assert of("rwkv7", value_residual=True) == [[0, 1, 2, 3]]


def test_layers_that_share_rows_go_together() -> None:
    case = Case("cla", "cla")
    with pytest.raises(UserError, match=r"layers \[0, 1\] share rows; remove all of them, or none"):
        without_layers(case.spec.build(), case.spec, [1])
    with pytest.raises(UserError, match="removing 4 layers leaves none; remove fewer"):
        without_layers(case.spec.build(), case.spec, range(4))
    model, spec = without_layers(case.spec.build(), case.spec, [0, 1])
    assert [s.rows[0].owner for s in model.state_specs()] == [None, 0]
    assert spec.scale.n_layers == len(spec.layers) == 2


def test_layers_whose_options_would_have_others_share_stay() -> None:
    case = Case("cla", "cla", {"cla": {"shared_layers": 1}})
    model = case.spec.build()
    assert teams(model) == [[0], [1], [2, 3]]
    smaller, _ = without_layers(model, case.spec, [0])
    assert teams(smaller) == [[0], [1, 2]]
    with pytest.raises(UserError, match=r"without layers \[2, 3\] others would share rows than do"):
        without_layers(model, case.spec, [3, 2])


def test_a_mixer_from_a_file_keeps_its_units_and_its_width() -> None:
    spec = ModelSpec(arch=str(FILES / "decayed_sum.py"), scale=SCALE, hidden=24)
    model = spec.build()
    assert list(axes_of(model.layers[0])) == ["mlp"]
    smaller, its = without_layers(model, spec, [2])
    assert len(smaller.layers) == 3 and its.layers[0].mixer == spec.arch
    says = r"value_gate.weight has 64 entries in a model of d_model=32 and 32 with 16, so the width"
    with pytest.raises(UserError, match=says):
        without_channels(model, spec, torch.arange(16))


def test_packed_weights_are_refused() -> None:
    case = Case("gqa", "gqa")
    model = store(case.spec.build(), WeightFormat.named("int8"))
    with pytest.raises(UserError, match="weights stored as int8 cannot be pruned; prune the model"):
        without_layers(model, case.spec, [1])


def test_axes_that_contradict_themselves_are_refused() -> None:
    units, more = spans(0, 4, 2), spans(0, 3, 2)

    def axis(**options: object) -> Axis:
        given = {"slices": (rows("a", units),), "signals": (read_by("out", units),), **options}
        return Axis(name="a", kind="width", fields={}, **given)  # type: ignore[arg-type]

    assert axis(groups=2).per_group == 2
    with pytest.raises(ValueError, match=r"axis a has units \[3, 4\]"):
        axis(slices=(rows("a", units), columns("b", more)))
    with pytest.raises(ValueError, match="in 3 groups"):
        axis(groups=3)
    with pytest.raises(ValueError, match="names a norm or its reader alone"):
        axis(norm="norm")
    with pytest.raises(ValueError, match=r"not \[n, k\]"):
        columns("a", units[0])
    with pytest.raises(ValueError, match=r"keeps \[2, 1\] units of its groups"):
        Choice(layer=0, axis=axis(groups=2), units=torch.tensor([0, 1, 2]))


def test_an_axis_that_forgets_an_option_is_found() -> None:
    case = Case("mha", "mha")
    model = case.spec.build()
    axis = Axis(
        name="wrong", kind="width", slices=(columns("mixer.out.weight", spans(0, 4, 8)),),
        signals=(), fields={},
    )  # fmt: skip
    choice = Choice(layer=0, axis=axis, units=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"out.weight is \[32, 16\] after pruning and \[32, 32\]"):
        without_units(model, case.spec, [choice])


def test_exponents_of_retention_are_one_a_head() -> None:
    spec = Case("linear", "linear", {"linear": {"exponents": [5.0, 6.0]}}).spec
    with pytest.raises(UserError, match="2 exponents are not one for each of n_heads=4"):
        spec.outline()
