"""Training a model that engines have held is training it without them, bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from archs.backbone import Model, cast
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from infer.engine import Engine
from tests.train.test_loop import VOCAB, Counting
from train.loop import train
from train.optim import Optimizer
from train.recipe import Recipe

SCALE = get_scale("tiny").with_options(
    {"d_model": 64, "head_dim": 32, "n_layers": 1, "vocab_size": VOCAB, "seq_len": 9}
)
SPEC = ModelSpec(arch="gqa", scale=SCALE, hidden=48)


def recipe(optimizer: str, **options: object) -> Recipe:
    fields = {"steps": 6, "batch": 4, "seq_len": 9, "learning_rate": 1e-2, "eval_every": 2,
              "log_every": 5, "checkpoint_every": 4, "optimizer": optimizer}  # fmt: skip
    return Recipe.from_dict({**fields, **options})


def generates(model: Model) -> Mapping[str, float]:
    return {"length": len(Engine(model, max_context=16).generate([[1, 2]], 3).tokens[0])}


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Interrupted(Counting):
    """A source that fails after five batches."""

    def batch_at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step == 5:
            raise InterruptedError
        return super().batch_at(step)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("held", ["before", "in evaluations", "before going on"])
def test_training_is_bit_equal_to_training_without_an_engine(
    held: str, optimizer: str, tmp_path: Path
) -> None:
    found = []
    for engines in (False, True):
        model, how, folder = SPEC.build(seed=2), recipe(optimizer), tmp_path / str(engines)
        if held == "before going on":
            with pytest.raises(InterruptedError):
                train(model, Interrupted(), how, folder, spec=SPEC)
        if engines and held != "in evaluations":
            generates(model)
        eval_fn = generates if engines and held == "in evaluations" else None
        result = train(model, Counting(), how, folder, spec=SPEC, eval_fn=eval_fn)
        assert result.status == "ok" and model.embedding.weight.is_contiguous()
        found.append(weights(model))
    plain, engined = found
    assert all(torch.equal(plain[name], engined[name]) for name in plain)
    assert not torch.equal(plain["embedding.weight"], SPEC.build(seed=2).embedding.weight)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_engine_between_backward_and_update_changes_nothing(optimizer: str) -> None:
    found = []
    for engines in (False, True):
        model = SPEC.build(seed=2)
        update = Optimizer(model, recipe(optimizer))
        for step in range(3):
            model(Counting().batch_at(step)[0]).square().mean().backward()
            if engines:
                generates(model)
            update.step(1e-2)
            update.zero_grad()
            update.take_back()
        found.append(weights(model))
    plain, engined = found
    assert all(torch.equal(plain[name], engined[name]) for name in plain)


def test_weights_that_became_another_type_are_refused() -> None:
    model = SPEC.build()
    update = Optimizer(model, recipe("adamw"))
    cast(model, torch.bfloat16)
    with pytest.raises(UserError, match=r"became torch\.bfloat16 on cpu during training"):
        update.step(1e-2)


def test_the_backend_of_an_evaluation_is_not_that_of_training(tmp_path: Path) -> None:
    model = SPEC.build()

    def elsewhere(model: Model) -> Mapping[str, float]:
        model.use("triton")
        return {}

    train(model, Counting(), recipe("adamw"), tmp_path, spec=SPEC, eval_fn=elsewhere)
    assert model.backend == "torch"
