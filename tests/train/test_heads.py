"""Drafts that are trained with a model: a head for the second token, and an early exit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backbone import Model, first_layers
from archs.cost import Step
from archs.errors import UserError
from archs.heads import HeadModel
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from tests.train.test_loop import RECIPE, SCALE, SPEC, VOCAB, Counting, Sparse, run, same_weights
from train.checkpoint import load_head, load_model
from train.heads import attached, attached_head, loss_of
from train.identity import Identity
from train.loop import CHECKPOINT_NAME, train, training_bytes
from train.metrics import read_metrics
from train.recipe import Recipe

HEADED = replace(RECIPE, mtp_weight=0.5)
DEEP = replace(SPEC, scale=SCALE.with_options({"n_layers": 4}))


def second_tokens(head: HeadModel, model: Model, inputs: Tensor) -> Tensor:
    """Logits [B, T - 1, V] of the tokens after the next ones."""
    hidden = model.hidden_states(inputs)
    return head.logits(head.hidden_states(inputs[:, 1:], hidden[:, :-1]))


@pytest.mark.parametrize("data", [Counting(), Sparse()], ids=["dense", "sparse"])
def test_the_heads_loss_is_that_of_the_second_token(data: Counting) -> None:
    inputs, targets = data.batch_at(3)
    model = SPEC.build()
    with attached(model, SPEC, HEADED):
        losses = loss_of(HEADED)(model, inputs, targets)
        head = HeadModel(model, attached_head(model))
        logits = second_tokens(head, model, inputs)
    after = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum")
    expected = 0.5 * after / (targets >= 0).sum()
    torch.testing.assert_close(losses.others, expected)
    torch.testing.assert_close(
        losses.next_token, loss_of(RECIPE)(model, inputs, targets).next_token, rtol=0, atol=0
    )
    assert loss_of(RECIPE)(model, inputs, targets).others is None


def test_the_early_exits_loss_is_that_of_the_first_layers() -> None:
    inputs, targets = Counting().batch_at(3)
    model = DEEP.build()
    losses = loss_of(replace(RECIPE, early_exit_layers=2, early_exit_weight=0.25))(
        model, inputs, targets
    )
    logits = first_layers(model, 2)(inputs)
    expected = 0.25 * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.others, expected)


def test_a_head_learns_and_lies_in_the_checkpoint(tmp_path: Path) -> None:
    model, result = run(tmp_path, replace(HEADED, steps=120))
    assert result.status == "ok" and not hasattr(model, "mtp")
    path = tmp_path / CHECKPOINT_NAME
    again = load_model(path)
    same_weights(model, again)
    inputs, targets = Counting().batch_at(10_000)
    found = second_tokens(load_head(path, again), again, inputs).argmax(-1)
    # A start alone does not say how it goes on, but here every sequence counts.
    assert (found == (inputs[:, 1:] + 1) % VOCAB).float().mean() > 0.9
    assert (again(inputs).argmax(-1) == targets).float().mean() > 0.9
    steps = [e for e in read_metrics(tmp_path / "metrics.jsonl") if e["event"] == "step"]
    others = [e["weighted_other_losses_nats"] for e in steps]
    assert others[-1] < 0.3 * others[0]


def test_first_layers_that_are_trained_to_draft_do(tmp_path: Path) -> None:
    def right(recipe: Recipe) -> float:
        model = DEEP.build()
        path = tmp_path / recipe.optimizer / str(recipe.early_exit_layers)
        assert train(model, Counting(), recipe, path, spec=DEEP).status == "ok"
        inputs, targets = Counting().batch_at(10_000)
        assert (model(inputs).argmax(-1) == targets).float().mean() > 0.9
        return float((first_layers(model, 1)(inputs).argmax(-1) == targets).float().mean())

    plain = replace(RECIPE, steps=120)
    exits = right(replace(plain, early_exit_layers=1, early_exit_weight=0.5))
    assert exits > 0.9 and exits > right(plain) + 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_a_head_resumes_to_the_same_weights(optimizer: str, tmp_path: Path) -> None:
    recipe = replace(HEADED, optimizer=optimizer, checkpoint_every=5)
    straight, _ = run(tmp_path / "straight", recipe)

    def stop(at: int) -> Counting:
        class Stopping(Counting):
            def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
                if step == at:
                    raise KeyboardInterrupt
                return super().batch_at(step)

        return Stopping()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "halved", recipe, data=stop(8))
    resumed, _ = run(tmp_path / "halved", recipe)
    same_weights(straight, resumed)
    one, other = (tmp_path / name / CHECKPOINT_NAME for name in ("straight", "halved"))
    same_weights(load_head(one, straight), load_head(other, straight))
    with pytest.raises(UserError, match=r"another run.*mtp_weight is 0.5 there, 0 here"):
        run(tmp_path / "halved", replace(recipe, mtp_weight=0.0))


def test_a_head_leaves_the_start_of_its_model_as_it_is() -> None:
    plain, headed = SPEC.build(seed=3), SPEC.build(seed=3)
    with attached(headed.use("triton"), SPEC, HEADED):
        assert attached_head(headed).block.mixer.backend == "triton"
    same_weights(plain, headed)


@pytest.mark.parametrize("arch", [*REGISTRY, *HYBRIDS])
def test_every_architecture_has_a_head_whose_cost_counts_its_weights(arch: str) -> None:
    spec = ModelSpec(arch=arch, scale=SCALE.with_options({"n_layers": 4, "seq_len": 16}), hidden=16)
    model = spec.build()
    with attached(model, spec, HEADED):
        head = HeadModel(model, attached_head(model))
        inputs, targets = Counting().batch_at(0)
        losses = loss_of(HEADED)(model, inputs, targets)
        assert losses.others is not None and losses.others.isfinite()
        assert losses.beside is not None
        losses.beside.backward()
        assert all(p.grad is not None for p in attached_head(model).parameters())
    weights = sum(p.nbytes for p in head.parameters()) - model.embedding.weight.nbytes
    rows = SCALE.d_model * 4
    cost = head.cost(Step(1, 1, 64))
    assert cost.weight_bytes == weights + model.embedding.weight.nbytes + rows


class First(Counting):
    """Targets at the first position alone, in all sequences or in half of them."""

    def __init__(self, share: int) -> None:
        self.share = share

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().batch_at(step)
        count = torch.tensor([[9]] * (4 - self.share) + [[1]] * self.share)
        return inputs, targets.where(torch.arange(targets.shape[1]) < count, -100)


@pytest.mark.parametrize("data", [Sparse(), First(2), First(4)], ids=["sparse", "half", "first"])
def test_accumulation_changes_memory_alone(data: Counting, tmp_path: Path) -> None:
    recipe = replace(HEADED, steps=3, eps=1e-3)
    whole, one = run(tmp_path / "1", recipe, data=data)
    parts, four = run(tmp_path / "4", replace(recipe, grad_accum=4), data=data)
    assert one.status == four.status == "ok"
    same_weights(whole, parts, atol=1e-5)
    heads = [load_head(tmp_path / n / CHECKPOINT_NAME, whole) for n in ("1", "4")]
    same_weights(*heads, atol=1e-5)


def test_a_head_serves_a_bfloat16_trunk(tmp_path: Path) -> None:
    run(tmp_path, HEADED)
    model = load_model(tmp_path / CHECKPOINT_NAME, dtype=torch.bfloat16)
    head = load_head(tmp_path / CHECKPOINT_NAME, model)
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    inputs, _ = Counting().batch_at(0)
    assert second_tokens(head, model, inputs).dtype == torch.bfloat16


def test_training_with_a_head_needs_room_for_it() -> None:
    weights = sum(p.nbytes for p in SPEC.head().parameters())
    assert training_bytes(SPEC, HEADED) - training_bytes(SPEC, RECIPE) == 4 * weights


@pytest.mark.parametrize(
    ("changed", "fragment"),
    [
        ({"early_exit_layers": 2}, "early_exit_layers=2 and early_exit_weight=0.0 belong together"),
        ({"early_exit_weight": 0.5}, "early_exit_layers=0 and early_exit_weight=0.5 belong"),
        ({"mtp_weight": -1.0}, "mtp_weight=-1.0 must be at least 0"),
        ({"mtp_weight": 0.3, "seq_len": 1}, "there is no second token to predict"),
    ],
)
def test_recipes_refuse_what_cannot_be(changed: dict[str, float], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        replace(RECIPE, **changed)  # type: ignore[arg-type]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(UserError, match="holds no head: it was trained with mtp_weight=0"):
        load_head(tmp_path / CHECKPOINT_NAME, SPEC.build())
    with pytest.raises(UserError, match="the first 1 layers of a model of 1 are no draft"):
        run(tmp_path / "exit", replace(RECIPE, early_exit_layers=1, early_exit_weight=1.0))


def test_recipes_of_before_keep_their_hash() -> None:
    assert Identity(spec=SPEC, recipe=RECIPE).config_hash == "2d497f84a4d3"
    assert Recipe.from_dict(HEADED.to_dict()) == HEADED
