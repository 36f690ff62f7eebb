"""Groups, AdamW against torch's, Muon against torch's and against the singular values."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from archs.backbone import Model
from archs.errors import UserError
from archs.layers import Projection
from archs.mixer import Mixer
from archs.registry import ModelSpec
from archs.sizes import get_scale
from train import optim
from train.optim import Optimizer, orthogonalised, parts_of
from train.recipe import Recipe

SCALE = get_scale("tiny").with_options(
    {"d_model": 64, "n_layers": 2, "vocab_size": 61, "seq_len": 16}
)


class Delicate(Mixer):
    """A mixer with every kind of parameter: split projection, small rows, decays, a vector."""

    delicate = frozenset({"a_log"})

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = Projection(dim, dim, dim, 4)
        self.out = Projection(dim, dim, residual=True)
        self.a_log = nn.Parameter(torch.zeros(dim, 3))
        self.conv = nn.Parameter(torch.zeros(dim, 4))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, shared: object = None) -> Tensor:
        a, b, gate = self.proj(x).split(self.proj.sizes, -1)
        mixed = a * torch.sigmoid(b) * gate.mean(-1, keepdim=True) + self.bias
        return self.out(mixed + x * (self.a_log.sum(1) + self.conv.sum(1)))


def delicate_model(dim: int = 64) -> Model:
    torch.manual_seed(1)
    return Model(vocab_size=61, d_model=dim, mixers=[Delicate(dim), Delicate(dim)], hidden=48)


def recipe(optimizer: str = "adamw", **options: object) -> Recipe:
    fields = {"steps": 10, "batch": 1, "seq_len": 5, "optimizer": optimizer, **options}
    return Recipe.from_dict(fields)


def give_gradients(model: Model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def weights(model: Model) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_decay_spares_vectors_and_delicate_parameters() -> None:
    parts = {p.name: p.decayed for p in parts_of(delicate_model(), split=False)}
    spared = {name for name, decayed in parts.items() if not decayed}
    assert spared == {
        "norm.weight",
        *(
            f"blocks.{layer}.{name}"
            for layer in (0, 1)
            for name in ("norm_mixer.weight", "norm_mlp.weight", "mixer.a_log", "mixer.bias")
        ),
    }


def test_muon_takes_hidden_matrices_by_their_parts_and_nothing_else() -> None:
    parts = parts_of(delicate_model(), split=True)
    first = [p.name.removeprefix("blocks.0.") for p in parts if p.name.startswith("blocks.0.")]
    matrices = {p.name for p in parts if p.matrix}
    assert "mixer.proj.weight[128:132]" in first
    assert matrices == {
        f"blocks.{layer}.{name}"
        for layer in (0, 1)
        for name in (
            "mixer.proj.weight[0:64]",
            "mixer.proj.weight[64:128]",
            "mixer.out.weight",
            "mlp.gate_up.weight[0:48]",
            "mlp.gate_up.weight[48:96]",
            "mlp.down.weight",
        )
    }


def test_frozen_parameters_have_no_part() -> None:
    model = delicate_model()
    model.embedding.weight.requires_grad_(False)
    assert all(p.name != "embedding.weight" for p in parts_of(model, split=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_moves_and_only_the_decayed_shrink(name: str) -> None:
    model = delicate_model()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    optimizer = Optimizer(model, recipe(name, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    for part in parts_of(model, split=False):
        expected = 2.0 * (1 - 0.1 * 0.5) if part.decayed else 2.0
        torch.testing.assert_close(part.owner, torch.full_like(part.owner, expected))


def test_adamw_equals_torchs() -> None:
    ours, theirs = delicate_model(), delicate_model()
    optimizer = Optimizer(ours, recipe())
    named = dict(theirs.named_parameters())
    decayed = {p.name for p in parts_of(theirs, split=False) if p.decayed}
    torchs = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.9, 0.95),
        fused=False,
        foreach=False,
    )
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        optimizer.step(3e-3)
        torchs.step()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, named[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_equals_torchs_on_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's iterates in bfloat16; in float32 both must agree to rounding.
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    model = delicate_model()
    optimizer = Optimizer(model, recipe("muon"))
    parts = [p for p in parts_of(model, split=True) if p.matrix]
    copies = [nn.Parameter(p.owner.detach()[p.rows].clone()) for p in parts]
    torchs = torch.optim.Muon(
        copies, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    for seed in range(3):
        give_gradients(model, seed)
        for part, copy in zip(parts, copies, strict=True):
            assert part.owner.grad is not None
            copy.grad = part.owner.grad[part.rows].clone()
        optimizer.step(0.02)
        torchs.step()
    for part, copy in zip(parts, copies, strict=True):
        torch.testing.assert_close(part.owner[part.rows], copy, atol=1e-5, rtol=1e-4, msg=part.name)


@pytest.mark.parametrize("shape", [(1, 33, 33), (3, 32, 129)], ids=["square", "wide-batch"])
def test_orthogonalised_keeps_directions_and_levels_singular_values(shape) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(shape)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalised(x) @ vh.mT
    values = inner.diagonal(dim1=1, dim2=2)
    large = s > 0.05 * s.amax(1, keepdim=True)
    assert values[large].min() > 0.5
    assert values[large].max() < 1.3
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_by_name_restores_the_same_future(name: str) -> None:
    model = delicate_model()
    optimizer = Optimizer(model, recipe(name))
    for seed in range(2):
        give_gradients(model, seed)
        optimizer.step(0.01)
    kept = {k: v.clone() for k, v in optimizer.tensors().items()}
    start = weights(model)

    def go_on(model: Model, optimizer: Optimizer) -> dict[str, Tensor]:
        for seed in range(2, 4):
            give_gradients(model, seed)
            optimizer.step(0.01)
        return weights(model)

    expected = go_on(model, optimizer)
    fresh = delicate_model()
    fresh.load_state_dict(start)
    restored = Optimizer(fresh, recipe(name))
    restored.load(kept)
    assert set(restored.tensors()) == set(kept)
    for key, value in go_on(fresh, restored).items():
        assert torch.equal(value, expected[key]), key


def test_missing_state_is_named() -> None:
    model = delicate_model()
    optimizer = Optimizer(model, recipe())
    give_gradients(model, 0)
    optimizer.step(0.01)
    state = dict(optimizer.tensors())
    del state["norm.weight.exp_avg"]
    with pytest.raises(UserError, match=r"norm\.weight\.exp_avg"):
        Optimizer(delicate_model(), recipe()).load(state)


def test_zero_grad_drops_every_gradient() -> None:
    model = delicate_model()
    optimizer = Optimizer(model, recipe("muon"))
    give_gradients(model, 0)
    optimizer.step(0.01)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert all(part.leaf.grad is None for part in optimizer._parts)


@pytest.fixture(scope="module")
def attention_model() -> Iterator[Model]:
    yield ModelSpec(arch="mha", scale=SCALE).build()


def test_parts_cover_every_parameter_once(attention_model: Model) -> None:
    for split in (False, True):
        covered = sum(p.leaf.numel() for p in parts_of(attention_model, split=split))
        assert covered == sum(p.numel() for p in attention_model.parameters())


def test_small_parts_are_left_to_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "MIN_MATRIX_SIDE", 1000)
    assert not any(p.matrix for p in parts_of(delicate_model(), split=True))
