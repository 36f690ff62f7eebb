"""Logit distillation: its loss and gradient by formula, and that students learn from parents."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.ops.matrix import dense
from archs.registry import HYBRIDS, REGISTRY
from archs.storage import store
from archs.weights import WeightFormat
from tests.train.pruning import SCALE, Case, grown, text
from train import distill
from train.distill import Distillation, distil, distillation, distillation_losses
from train.heads import loss_of
from train.loop import TrainResult, train
from train.metrics import read_metrics
from train.prune import Plan, prune
from train.recipe import Recipe
from train.sparse import Sparsity, kept_zero, sparsify
from train.tokens import TokenSet

RECIPE = Recipe(steps=30, batch=4, seq_len=16, learning_rate=1e-2, checkpoint_every=0, log_every=5)
SPEC = Case("gqa", "gqa").spec


def tokens() -> TokenSet:
    """Counting with a few surprises."""
    generator = np.random.default_rng(0)
    ids = (np.arange(4000) + generator.integers(0, 2, 4000)) % SCALE.vocab_size
    ids = ids.astype(np.uint16)
    return TokenSet(
        train=ids, held_out=ids[:500], offsets=(0, 500),
        token_bytes=np.ones(SCALE.vocab_size, dtype=np.int64), eot_id=0,
        vocab_size=SCALE.vocab_size, name="counting",
    )  # fmt: skip


@pytest.mark.parametrize("rows_at_once", [1, 5, 1000])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (3.0, 0.25), (0.5, 0.7)])
def test_loss_and_gradient_are_those_of_the_formula(
    rows_at_once: int, temperature: float, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64: dKL·T²/dz = T (softmax(z/T) - softmax(z'/T)), whatever the chunks."""
    classes, rows, t = 23, 17, temperature
    monkeypatch.setattr(distill, "CHUNK_BYTES", 4 * classes * rows_at_once)
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden, head = normal(rows, 6).requires_grad_(), normal(classes, 6).requires_grad_()
    known, parent_head = normal(rows, 9), normal(classes, 9)
    targets = torch.randint(classes, (rows,), generator=draw)
    cross, divergence = distillation_losses(hidden, head, known, parent_head, targets, t)
    ((1 - weight) * cross + weight * t**2 * divergence).backward()

    z, wanted = (hidden @ head.T).detach(), known @ parent_head.T
    p, q = torch.softmax(wanted / t, -1), torch.softmax(z / t, -1)
    torch.testing.assert_close(divergence.detach(), (p * (p / q).log()).sum(-1).mean())
    own = torch.softmax(z, -1)
    at = torch.arange(rows)
    torch.testing.assert_close(cross.detach(), -own[at, targets].log().mean())
    onehot = torch.zeros_like(z).index_put_((at, targets), torch.ones((), dtype=z.dtype))
    d = ((1 - weight) * (own - onehot) + weight * t * (q - p)) / rows
    torch.testing.assert_close(hidden.grad, d @ head.detach(), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(head.grad, d.T @ hidden.detach(), atol=1e-12, rtol=1e-10)


def test_no_more_logits_exist_at_once_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    widest, chunk = [], distill._chunk
    monkeypatch.setattr(distill, "CHUNK_BYTES", 4 * SCALE.vocab_size * 7)

    def watch(hidden: Tensor, *rest: Tensor) -> Tensor:
        widest.append(len(hidden))
        return chunk(hidden, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(distill, "_chunk", watch)
    student, parent, ids = SPEC.build(seed=1), SPEC.build(seed=2), text(2, 16)
    losses = distillation(parent, Distillation())(student, ids, ids)
    assert losses.others is not None
    (losses.next_token + losses.others).backward()
    # Each of them once more in the backward pass.
    assert sorted(widest) == [4] * 2 + [7] * 8


@pytest.mark.parametrize("arch", [*REGISTRY, *HYBRIDS])
def test_a_student_that_equals_its_parent_has_nothing_to_learn(arch: str) -> None:
    parent = grown(Case(arch, arch).spec)
    student, ids = deepcopy(parent), text(2, 12)
    losses = distillation(parent, Distillation(weight=1.0, temperature=2.0))(student, ids, ids)
    assert losses.others is not None
    (losses.next_token + losses.others).backward()
    assert float(losses.others.detach()) == pytest.approx(0, abs=1e-12)
    for parameter in student.parameters():
        assert parameter.grad is None or float(parameter.grad.abs().max()) < 1e-10
    assert all(p.grad is None for p in parent.parameters())


def test_targets_that_are_padding_count_for_nothing() -> None:
    student, parent = grown(SPEC, 1), grown(SPEC, 2)
    loss = distillation(parent, Distillation(temperature=2.0, weight=0.25))
    inputs, targets = text(3, 12), text(3, 12, seed=5)
    cut = targets.clone()
    cut[:, 7:] = -100
    short = loss(student, inputs[:, :7], targets[:, :7])
    padded = loss(student, inputs, cut)
    torch.testing.assert_close(padded.next_token, short.next_token)
    torch.testing.assert_close(padded.others, short.others)
    assert float(short.next_token.detach()) == pytest.approx(
        float(loss_of(RECIPE)(student, inputs[:, :7], targets[:, :7]).next_token.detach())
    )


def test_what_is_reported_is_the_texts_loss_and_what_is_trained_is_the_mixture() -> None:
    student, parent, ids = grown(SPEC, 1), grown(SPEC, 2), text(2, 12)
    how = Distillation(temperature=2.0, weight=0.3)
    plain = loss_of(RECIPE)(student, ids, ids).next_token
    losses = distillation(parent, how)(student, ids, ids)
    torch.testing.assert_close(losses.next_token, plain)
    p, q = ((m(ids) / 2).log_softmax(-1).detach() for m in (parent, student))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(losses.others, 0.3 * 2**2 * divergence)
    weight = student.layers[-1].get_parameter("mlp.down.weight")
    text_alone = torch.autograd.grad(plain, weight)[0]
    assert losses.others is not None
    together = torch.autograd.grad(losses.next_token + losses.others, weight, retain_graph=True)[0]
    parents = torch.autograd.grad(losses.others, weight)[0]
    torch.testing.assert_close(together, 0.7 * text_alone + parents, atol=1e-12, rtol=1e-9)


def kl(parent: Model, student: Model) -> float:
    ids = torch.arange(200).view(8, 25) % SCALE.vocab_size
    with torch.no_grad():
        p, q = (m(ids).log_softmax(-1) for m in (parent, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_pruned_model_gets_nearer_to_its_parent_than_by_text_alone(tmp_path: Path) -> None:
    parent = SPEC.build()
    control(parent, tmp_path / "before", None, steps=120)
    parent.eval()
    before = [p.clone() for p in parent.parameters()]
    start, spec = prune(parent, SPEC, Plan.named("heads:0.5,mlp:0.5,layers:1"), text())
    away = {"pruned": kl(parent, start)}
    for name, teacher in (("text", None), ("parent", parent)):
        model = deepcopy(start)
        result = distil(
            model, tokens(), RECIPE, tmp_path / name, spec=spec, steps=40, rate=0.3, seed=1,
            parent=teacher, how=Distillation(weight=1.0),
        )  # fmt: skip
        assert (result.status, result.steps) == ("ok", 40)
        away[name] = kl(parent, model)
    assert away["parent"] < 0.8 * away["text"] and away["parent"] < away["pruned"]
    assert all(torch.equal(p, q) for p, q in zip(before, parent.parameters(), strict=True))
    assert not parent.training
    logged = read_metrics(tmp_path / "parent" / "metrics.jsonl")
    assert all(line["weighted_other_losses_nats"] > 0 for line in logged if line["event"] == "step")


def control(model: Model, folder: Path, parent: Model | None, steps: int = 10) -> TrainResult:
    return distil(
        model, tokens(), RECIPE, folder, spec=SPEC, steps=steps, rate=1.0, parent=parent, seed=1
    )


def test_without_a_parent_it_is_plain_training_on_the_same_tokens(tmp_path: Path) -> None:
    one, other = SPEC.build(), SPEC.build()
    control(one, tmp_path / "one", None)
    recipe = replace(RECIPE, steps=10, seed=1)
    text_of = distill.Batches(tokens(), batch=4, seq_len=16, seed=1)
    train(other, text_of, recipe, tmp_path / "other", spec=SPEC)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_a_sparse_model_learns_from_a_packed_parent_and_stays_sparse(tmp_path: Path) -> None:
    parent = store(SPEC.build(seed=4), WeightFormat.named("int8"))
    model = SPEC.build(seed=4)
    masks = sparsify(model, Sparsity.named("2:4-magnitude"))
    with kept_zero(model, masks):
        assert control(model, tmp_path, parent).status == "ok"
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in masks.items())
    assert dense(parent.head_weight).shape == (SCALE.vocab_size, SCALE.d_model)


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    other = replace(SPEC, scale=SCALE.with_options({"vocab_size": 50})).build()
    says = "the parent predicts 50 tokens and the student 61; logits can be distilled over one"
    with pytest.raises(UserError, match=says):
        control(SPEC.build(), tmp_path, other)
    with pytest.raises(UserError, match=says):
        distillation(other, Distillation())(SPEC.build(), text(), text())
    assert not list(tmp_path.iterdir())
    for options, says in (
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"weight": 0.0}, "weight=0.0 must be positive"),
        ({"weight": 1.5}, "weight=1.5 must be at most 1, which leaves the text out"),
    ):
        with pytest.raises(UserError, match=says):
            Distillation(**options)
