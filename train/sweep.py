"""The learning-rate sweep: every architecture gets the same search before it is compared.

Mixers differ in the rates that suit them, and recurrent ones learn recall only in a narrow band
(arXiv 2508.19029), so one rate for all would rank rates, not architectures. Short runs at each
rate of a grid give a curve, and the curve is part of the result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from archs.backbone import Model
from archs.errors import UserError
from archs.registry import ModelSpec
from train.heads import LossFunction
from train.loop import Batches, Status, StepReport, train
from train.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """One learning rate's short run; `score` is nan where the run failed."""

    learning_rate: float
    score: float
    status: Status


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A learning-rate curve, sorted by rate.

    best: the rate with the lowest score; None when every run failed.
    edge: "lowest" or "highest" when the best rate is the grid's end, where a better one may lie
        beyond; "" when it has neighbours on both sides.
    complete: False when the deadline cut the sweep; run it again to go on.
    """

    best: float | None
    curve: tuple[SweepPoint, ...]
    edge: Literal["", "lowest", "highest"]
    complete: bool


def sweep(
    make_model: Callable[[], Model],
    data: Batches,
    recipe: Recipe,
    score_fn: Callable[[Model], float],
    run_dir: Path,
    *,
    spec: ModelSpec,
    steps: int,
    data_fingerprint: str = "",
    max_extra: int = 2,
    resume_run: bool = True,
    progress: Callable[[StepReport], None] | None = None,
    deadline: float | None = None,
    loss_fn: LossFunction | None = None,
) -> Sweep:
    """Train `steps` steps at each of `recipe.learning_rates` and compare by score, lower better.

    Each short run has the whole schedule and its own folder `lr_RATE`, so a sweep resumes too.
    While the best rate is at an edge, up to `max_extra` rates are added beyond it, spaced as
    the grid is there. Choose on development text, never on the test split.
    Raises UserError when the recipe has no grid.
    """
    if not recipe.learning_rates:
        raise UserError("learning_rates=() gives a sweep nothing to try; set at least one rate")
    waiting = sorted(set(recipe.learning_rates))
    points: list[SweepPoint] = []
    while True:
        for rate in waiting:
            result = train(
                make_model(),
                data,
                replace(recipe, steps=steps, learning_rate=rate),
                run_dir / f"lr_{rate:g}",
                spec=spec,
                data_fingerprint=data_fingerprint,
                resume_run=resume_run,
                progress=progress,
                deadline=deadline,
                eval_fn=lambda model: {"score": score_fn(model)},
                loss_fn=loss_fn,
            )
            if result.status == "stopped":
                return _judged(points, complete=False)
            score = result.evaluation.get("score", float("nan"))
            points.append(SweepPoint(learning_rate=rate, score=score, status=result.status))
        found = _judged(points, complete=True)
        if not found.edge or max_extra < 1:
            return found
        max_extra -= 1
        waiting = [_beyond([p.learning_rate for p in found.curve], found.edge)]


def _judged(points: list[SweepPoint], *, complete: bool) -> Sweep:
    curve = sorted(points, key=lambda p: p.learning_rate)
    sound = [p for p in curve if p.status == "ok" and math.isfinite(p.score)]
    best = min(sound, key=lambda p: p.score) if sound else None
    edge: Literal["", "lowest", "highest"] = ""
    if best is not None and best is curve[-1]:
        edge = "highest"
    elif best is not None and best is curve[0]:
        edge = "lowest"
    return Sweep(
        best=None if best is None else best.learning_rate,
        curve=tuple(curve),
        edge=edge,
        complete=complete,
    )


def _beyond(rates: list[float], edge: str) -> float:
    """The next rate past that edge: the ratio of the last two, or a factor of two."""
    last, before = (rates[-1], rates[-2:][0]) if edge == "highest" else (rates[0], rates[:2][-1])
    ratio = last / before if len(rates) > 1 else 2.0
    return float(f"{last * ratio:.3g}")
