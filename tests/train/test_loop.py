"""The loop: it learns, accumulates exactly, says how it ended, and sweeps learning rates."""

import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from train import loop
from train.checkpoint import read_metadata
from train.heads import Losses, loss_of
from train.loop import CHECKPOINT_NAME, TrainResult, train
from train.metrics import read_metrics
from train.recipe import Recipe
from train.sweep import sweep

VOCAB, BATCH, TOKENS = 31, 4, 9
SCALE = get_scale("tiny").with_options(
    {"d_model": 32, "head_dim": 16, "n_layers": 1, "vocab_size": VOCAB, "seq_len": TOKENS}
)
SPEC = ModelSpec(arch="mha", scale=SCALE, hidden=32)
RECIPE = Recipe(
    steps=12, batch=BATCH, seq_len=TOKENS, learning_rate=1e-2, log_every=5, checkpoint_every=0
)


class Counting:
    """Sequences that count upwards from a random start: easy to learn."""

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        start = torch.randint(VOCAB, (BATCH, 1), generator=generator)
        tokens = (start + torch.arange(TOKENS + 1)) % VOCAB
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Sparse(Counting):
    """Few targets, unevenly spread over the batch; none in the last sequence."""

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().batch_at(step)
        keep = torch.arange(TOKENS) < torch.tensor([[7], [1], [2], [0]])
        return inputs, targets.where(keep, -100)


def run(path: Path, recipe: Recipe = RECIPE, **options: object) -> tuple[Model, TrainResult]:
    model = SPEC.build()
    data = options.pop("data", Counting())
    result = train(model, data, recipe, path, spec=SPEC, **options)  # type: ignore[arg-type]
    return model, result


def next_token_loss(model: Model, inputs: Tensor, targets: Tensor) -> Tensor:
    return loss_of(RECIPE)(model, inputs, targets).next_token


def same_weights(a: Model, b: Model, atol: float = 0.0) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_to_count(optimizer: str, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=80, optimizer=optimizer, log_every=40)
    model, result = run(tmp_path, recipe)
    inputs, targets = Counting().batch_at(10_000)
    assert result.status == "ok"
    assert next_token_loss(model, inputs, targets).item() < 0.5
    assert result.train_loss_nats < 1.5
    assert (result.steps, result.tokens) == (80, 80 * BATCH * TOKENS)
    assert result.tok_per_s == pytest.approx(result.tokens / result.seconds)


@pytest.mark.parametrize("data", [Counting(), Sparse()], ids=["dense", "sparse"])
def test_accumulation_changes_memory_alone(data: Counting, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=3, eps=1e-3)
    whole, one = run(tmp_path / "1", recipe, data=data)
    parts, four = run(tmp_path / "4", replace(recipe, grad_accum=4), data=data)
    same_weights(whole, parts, atol=1e-5)
    assert one.train_loss_nats == pytest.approx(four.train_loss_nats, abs=1e-5)


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    def steep(model: Model, inputs: Tensor, targets: Tensor) -> Losses:
        return Losses(1000 * next_token_loss(model, inputs, targets))

    model = SPEC.build()
    seen: list[float] = []
    original = torch.nn.utils.clip_grad_norm_

    def clip(parameters: list[Tensor], *args: float, **kwargs: bool) -> Tensor:
        before = original(parameters, *args, **kwargs)
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())
        return before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        train(
            model,
            Counting(),
            replace(RECIPE, steps=2, clip=0.5, log_every=1),
            tmp_path,
            spec=SPEC,
            loss_fn=steep,
        )
    assert seen == pytest.approx([0.5, 0.5], rel=1e-3)
    logged = [e["grad_norm"] for e in read_metrics(tmp_path / "metrics.jsonl") if "grad_norm" in e]
    assert min(logged) > 100


def test_log_has_a_header_and_units_and_every_event(tmp_path: Path) -> None:
    reports = []
    evaluations: list[int] = []

    def evaluate(model: Model) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        evaluations.append(1)
        return {"dev_bits_per_byte": float(len(evaluations))}

    recipe = replace(RECIPE, eval_every=6)
    model, result = run(tmp_path, recipe, eval_fn=evaluate, progress=reports.append)
    events = read_metrics(tmp_path / "metrics.jsonl")
    assert [(e["event"], e["step"]) for e in events] == [
        ("start", 0),
        ("step", 5),
        ("step", 6),
        ("eval", 6),
        ("step", 10),
        ("step", 12),
        ("eval", 12),
        ("end", 12),
    ]
    assert events[0]["loggers"][0] == "jsonl"
    assert events[0]["recipe"] == recipe.to_dict()
    assert events[-1]["status"] == "ok"
    assert events[1]["learning_rate"] == recipe.learning_rate_at(4)
    assert events[-2] == {"event": "eval", "step": 12, "dev_bits_per_byte": 2.0}
    assert result.evaluation == {"dev_bits_per_byte": 2.0}
    assert [r.step for r in reports] == [5, 6, 10, 12]
    assert model.training


def poisoned(at: int) -> Callable[[Model, Tensor, Tensor], Losses]:
    calls: list[int] = []

    def loss_fn(model: Model, inputs: Tensor, targets: Tensor) -> Losses:
        calls.append(1)
        loss = next_token_loss(model, inputs, targets)
        return Losses(loss * float("nan") if len(calls) == at else loss)

    return loss_fn


def test_nan_ends_the_run_with_its_status_and_no_checkpoint(tmp_path: Path) -> None:
    recipe = replace(RECIPE, checkpoint_every=2)
    _, result = run(tmp_path, recipe, loss_fn=poisoned(5))
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert result.status == "nan"
    assert last["event"] == "end" and last["status"] == "nan"
    assert math.isfinite(result.train_loss_nats)
    # The checkpoint of step 4 stands; a finite continuation succeeds from it.
    _, again = run(tmp_path, recipe)
    assert again.status == "ok" and again.steps == 12


def test_divergence_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "DIVERGED_STEPS", 15)
    factor = [1.0]

    def rising(model: Model, inputs: Tensor, targets: Tensor) -> Losses:
        factor[0] *= 1.05
        nothing = 0 * sum(p.sum() for p in model.parameters())
        return Losses(next_token_loss(model, inputs, targets).detach() * factor[0] + nothing)

    recipe = replace(RECIPE, steps=200)
    _, result = run(tmp_path, recipe, loss_fn=rising)
    assert result.status == "diverged"
    assert 30 < result.steps < 100


def test_deadline_stops_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = run(tmp_path / "straight")
    with monkeypatch.context() as patch:
        ticks = itertools.count()
        clock = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter)
        patch.setattr(loop, "time", clock)
        _, stopped = run(tmp_path / "cut", deadline=7)
    assert (stopped.status, stopped.steps) == ("stopped", 7)
    assert read_metadata(tmp_path / "cut" / CHECKPOINT_NAME).progress.step == 7
    model, result = run(tmp_path / "cut")
    assert (result.status, result.steps) == ("ok", RECIPE.steps)
    same_weights(model, expected)


def test_deadline_before_the_first_step_writes_no_checkpoint(tmp_path: Path) -> None:
    _, result = run(tmp_path, deadline=time.monotonic() - 1)
    assert (result.status, result.steps) == ("stopped", 0)
    assert not (tmp_path / CHECKPOINT_NAME).exists()


def test_a_finished_run_is_not_run_again_unless_asked(tmp_path: Path) -> None:
    _, first = run(tmp_path, eval_fn=lambda _: {"dev": 3.0})
    log = (tmp_path / "metrics.jsonl").read_text()

    def forbidden(*_: object) -> Tensor:
        raise AssertionError("a finished run trained again")

    _, second = run(tmp_path, loss_fn=forbidden)
    assert second == first
    assert (tmp_path / "metrics.jsonl").read_text() == log
    with pytest.raises(AssertionError, match="trained again"):
        run(tmp_path, loss_fn=forbidden, resume_run=False)


class Fixed:
    """The same batch at every step."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.batch = inputs, targets

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        return self.batch


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        ((BATCH, TOKENS + 1), 0, r"\(4, 10\), the recipe says batch, seq_len = \(4, 9\)"),
        ((BATCH, TOKENS), VOCAB, "token 31, the model's vocab_size is 31"),
        ((BATCH, TOKENS), -100, "no target at all"),
    ],
    ids=["shape", "vocabulary", "no-target"],
)
def test_batches_that_do_not_fit(
    shape: tuple[int, int], value: int, message: str, tmp_path: Path
) -> None:
    inputs = torch.full(shape, max(value, 0))
    with pytest.raises(UserError, match=message):
        run(tmp_path, data=Fixed(inputs, torch.full(shape, value)))


def test_bf16_needs_cuda(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="autocast=bf16 needs a CUDA device"):
        run(tmp_path, replace(RECIPE, autocast="bf16"))


def sweep_at(path: Path, scores: dict[float, float], **options: object):  # type: ignore[no-untyped-def]
    """A sweep whose score is given by rate; 100 times the rate where it is not."""

    def make() -> Model:
        return SPEC.build()

    recipe = replace(RECIPE, learning_rates=tuple(scores))
    trained: list[float] = []

    def score(_: Model) -> float:
        rates = {float(folder.name.removeprefix("lr_")) for folder in path.glob("lr_*")}
        (rate,) = rates.difference(trained)
        trained.append(rate)
        return scores.get(rate, 100.0 * rate)

    found = sweep(make, Counting(), recipe, score, path, spec=SPEC, steps=2, **options)
    return found, trained


def test_sweep_finds_the_best_between_others(tmp_path: Path) -> None:
    found, trained = sweep_at(tmp_path, {2e-3: 3.0, 4e-3: 1.0, 8e-3: 2.0})
    assert (found.best, found.edge, found.complete) == (4e-3, "", True)
    assert [(p.learning_rate, p.score) for p in found.curve] == [
        (2e-3, 3.0),
        (4e-3, 1.0),
        (8e-3, 2.0),
    ]
    assert trained == [2e-3, 4e-3, 8e-3]
    again, trained = sweep_at(tmp_path, {2e-3: 3.0, 4e-3: 1.0, 8e-3: 2.0})
    assert again == found and trained == []


def test_sweep_goes_beyond_an_edge_and_says_when_it_stays_there(tmp_path: Path) -> None:
    inner = {2e-3: 3.0, 4e-3: 2.0, 8e-3: 1.0}
    found, trained = sweep_at(tmp_path / "a", inner, max_extra=2)
    assert trained == [2e-3, 4e-3, 8e-3, 1.6e-2]
    assert (found.best, found.edge) == (8e-3, "")
    found, _ = sweep_at(tmp_path / "b", inner, max_extra=0)
    assert (found.best, found.edge) == (8e-3, "highest")
    found, _ = sweep_at(tmp_path / "c", {2e-3: 1.0, 4e-3: 2.0}, max_extra=0)
    assert (found.best, found.edge) == (2e-3, "lowest")


def test_sweep_leaves_failed_rates_out_but_records_them(tmp_path: Path) -> None:
    found, _ = sweep_at(tmp_path, {4e-3: float("nan"), 8e-3: 2.0, 9e-3: 4.0}, max_extra=0)
    assert found.best == 8e-3
    assert math.isnan(found.curve[0].score)


def test_sweep_stopped_by_the_deadline_is_incomplete(tmp_path: Path) -> None:
    found, trained = sweep_at(tmp_path, {1e-3: 1.0}, deadline=time.monotonic() - 1)
    assert (found.best, found.curve, found.complete, trained) == (None, (), False, [])


def test_sweep_needs_a_grid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learning_rates"):
        sweep_at(tmp_path, {})


LONG = Recipe(steps=1000, batch=2, seq_len=3, learning_rate=1.0)


def test_wsd_schedule_warms_up_stays_and_decays_to_the_floor() -> None:
    rates = [LONG.learning_rate_at(step) for step in range(1000)]
    assert (LONG.warmup_steps, LONG.decay_steps) == (50, 500)
    assert rates[0] == pytest.approx(1 / 50) and rates[49:500] == [1.0] * 451
    assert rates[749] == pytest.approx(0.05 + 0.95 * 250 / 500)
    assert rates[999] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(rates[49:]))


def test_cosine_schedule_is_half_way_in_the_middle() -> None:
    recipe = replace(LONG, schedule="cosine", warmup=0.0, steps=1001, floor=0.1)
    rates = [recipe.learning_rate_at(step) for step in (0, 500, 1000)]
    assert rates == pytest.approx([1.0, 0.55, 0.1], abs=2e-3)


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 50), (300, 20), (100, 10), (1, 0)])
def test_short_runs_warm_up_longer_but_not_forever(steps: int, warmup: int) -> None:
    assert replace(LONG, steps=steps).warmup_steps == warmup


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1e-3}, "Did you mean 'learning_rate'"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
        ({"schedule": "wds"}, "Unknown schedule 'wds'"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"steps": "9"}, "steps must be of type int, not '9'"),
        ({"steps": True}, "steps must be of type int, not True"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
        ({"learning_rate": 0}, "learning_rate=0.0 must be positive"),
        ({"learning_rates": ["x"]}, "learning_rates must be of type float, not 'x'"),
        ({"learning_rates": [1e-3, -1.0]}, "learning_rates=-1.0 must be positive"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"betas": [0.9]}, "betas must have 2 entries, not 1"),
        ({"batch": 6, "grad_accum": 4}, "batch=6 is not divisible by grad_accum=4"),
        ({"warmup": 0.6, "decay": 0.6}, "make one of them smaller"),
        ({"floor": 1.5}, "floor=1.5 must be a fraction"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_bad_recipes_name_value_and_rule(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.from_dict({"steps": 100, "batch": 4, "seq_len": 8, **options})


def test_recipe_survives_json() -> None:
    recipe = replace(LONG, learning_rates=(1e-3, 2e-3), optimizer="muon")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(UserError, match="the recipe lacks 'batch'; add it"):
        Recipe.from_dict({"steps": 5})
