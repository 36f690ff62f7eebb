"""A pruned model is a model like any other: it decodes, trains, is stored, and has learnt."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from archs.errors import UserError
from archs.narrow import axes_of
from archs.registry import ModelSpec
from archs.weights import WeightFormat
from infer.engine import Engine
from tests.train.pruning import CASES, SCALE, Case, Text, spec_of, text
from train import prune as train_prune
from train.checkpoint import (
    Identity,
    load_head,
    load_model,
    read_metadata,
    read_spec,
    save_compressed,
    save_pruned,
)
from train.compress import compress
from train.heads import loss_of
from train.loop import CHECKPOINT_NAME, train
from train.prune import Plan, prune
from train.recipe import Recipe

ARCHS = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@ARCHS
@pytest.mark.parametrize("plan", ["state:0.5", "width:0.5,mlp:1/3,layers:2", "heads:0.5,mlp:0.5"])
def test_a_pruned_model_decodes_trains_and_is_stored_like_any_other(
    case: Case, plan: str, tmp_path: Path
) -> None:
    first = plan.partition(":")[0]
    if first in ("state", "heads") and not halves(case.spec, first):
        pytest.skip("nothing to leave out: a test of its own says so")
    parent = case.spec.build().eval()
    smaller, spec = prune(parent, case.spec, Plan.named(plan), text())
    assert "state" not in plan or smaller.state_bytes(40) < parent.state_bytes(40)
    assert smaller.non_embedding_parameters() < parent.non_embedding_parameters()
    recipe = Recipe(steps=1, batch=2, seq_len=12, learning_rate=1e-3, checkpoint_every=0)
    result = train(smaller, Text(), recipe, tmp_path, spec=spec)
    assert result.status == "ok"
    path = tmp_path / CHECKPOINT_NAME
    assert read_spec(path) == spec
    identity = Identity(spec=spec, recipe=recipe)
    assert read_metadata(path).identity == identity
    loaded = load_model(path, dtype=torch.float64)
    assert all(
        torch.equal(p.double(), q)
        for p, q in zip(smaller.parameters(), loaded.parameters(), strict=True)
    )
    # The folder is taken up again: the identity reads back as it was written.
    assert train(smaller, Text(), recipe, tmp_path, spec=spec).steps == 1
    # One `forward` of all tokens, and an engine that prefills some and extends by others.
    ids = text(2, 14, seed=3)
    engine = Engine(loaded, max_sequences=2, max_context=32, page_size=4)
    slots = [engine.store.add() for _ in ids]
    with torch.no_grad():
        whole = loaded(ids)
    pieces = [engine.extend(slots, piece) for piece in ids.split([6, 1, 1, 4, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)


def halves(spec: ModelSpec, name: str) -> bool:
    """Whether a model has such an axis, and always an even number of units to choose from."""
    axes = [train_prune._axis(axes_of(block), name) for block in spec.outline().layers]
    return any(axes) and all(axis is None or axis.per_group % 2 == 0 for axis in axes)


def test_a_pruned_model_is_stored_before_anybody_trains_it_on(tmp_path: Path) -> None:
    recipe = Recipe(
        steps=2, batch=2, seq_len=12, learning_rate=1e-3, checkpoint_every=0, mtp_weight=0.3
    )
    parent = tmp_path / "parent" / CHECKPOINT_NAME
    train(spec_of("gdn").build(), Text(), recipe, parent.parent, spec=spec_of("gdn"))
    path, again = tmp_path / CHECKPOINT_NAME, tmp_path / "again.safetensors"
    smaller, spec = prune(load_model(parent), spec_of("gdn"), Plan.named("state:0.5"), text())
    save_pruned(path, smaller, spec, "state:0.5", parent)
    assert read_spec(path) == spec
    before, metadata = read_metadata(parent), read_metadata(path)
    assert (before.pruned, metadata.pruned) == ("", "state:0.5")
    assert "pruned" not in before.describe() and "weights" not in metadata.describe()
    assert metadata.config_hash == metadata.identity.config_hash != before.config_hash
    loaded = load_model(path)
    assert all(map(torch.equal, smaller.state_dict().values(), loaded.state_dict().values()))
    with pytest.raises(UserError, match="holds no head"):
        load_head(path, loaded)
    with pytest.raises(UserError, match=r"pruned by state:0.5 and no optimizer's state; load"):
        train(loaded, Text(), metadata.identity.recipe, tmp_path, spec=spec)
    # Again, and then in few bits.
    smallest, its = prune(loaded, spec, Plan.named("layers:1"), text())
    save_pruned(again, smallest, its, "layers:1", path)
    assert read_metadata(again).pruned == "state:0.5,layers:1"
    save_compressed(again, compress(smallest, WeightFormat.named("int8")), again)
    assert (read_metadata(again).weights, read_metadata(again).pruned) == (
        "int8", "state:0.5,layers:1",
    )  # fmt: skip
    packed = load_model(again)
    assert len(packed.layers) == 3 and packed.weight_format == "int8"
    assert len(Engine(packed, max_context=32).generate([[1, 2, 3]], 4).tokens[0]) == 4


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("gqa", ["mlp", "width"]),
        ("mla", ["rank", "value_dim"]),
        ("gdn", ["key_dim", "value_dim"]),
        ("mamba1", ["inner", "mlp"]),
        ("mamba2", ["head_dim", "heads"]),
        ("linear", ["value_dim", "width"]),
    ],
)
def test_a_trained_model_loses_less_with_the_units_of_most_importance(
    arch: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than with those of the least, on other text of the same kind."""
    model, held_out = spec_of(arch).build(), counting(7)
    recipe = Recipe(steps=160, batch=8, seq_len=12, learning_rate=5e-3, checkpoint_every=0)
    train(model, Counted(), recipe, tmp_path, spec=spec_of(arch))
    model.eval()

    def loss(plan: str) -> float:
        smaller, _ = prune(model, spec_of(arch), Plan.named(plan), counting(6)[:, :-1])
        inputs, targets = held_out[:, :-1], held_out[:, 1:]
        with torch.no_grad():
            return float(loss_of(recipe)(smaller, inputs, targets).next_token)

    best, top = {name: loss(f"{name}:0.5") for name in names}, train_prune._top
    monkeypatch.setattr(train_prune, "_top", lambda scores, *rest: top(-scores, *rest))
    for name in names:
        assert best[name] < loss(f"{name}:0.5") - 0.02


def counting(seed: int) -> Tensor:
    """Sequences [8, 13] that count upwards, and now and then skip one."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(SCALE.vocab_size, (8, 1), generator=generator)
    steps = torch.randint(1, 3, (8, 12), generator=generator)
    return torch.cat((start, start + steps.cumsum(1)), 1) % SCALE.vocab_size


class Counted:
    """Batches of `counting`."""

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        ids = counting(step + 100)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
