"""The points of a suite, in the order in which they are measured."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.measure.cost import CONTEXTS
from eval.results.point import Point
from eval.suite import CorpusPlan, DecodePlan, QualityPlan, Suite, TrainPlan


def points(suite: Suite, device: str) -> Iterator[Point]:
    """All points of a suite on a kind of device (cpu, cuda).

    They go stage by stage, so that a short time budget leaves every architecture with the same
    columns.
    """
    rows = sorted({b for plan in suite.decode for b in plan.batches})
    yield Point(stage="hardware", device=device, options={"rows": rows})
    for arch, scale in product(suite.archs, suite.scales):
        yield _of(
            suite.model(arch, get_scale(scale)), "cost", device, scale, {"contexts": [*CONTEXTS]}
        )
    train, recall = suite.train, suite.mqar
    if train is not None:
        for seed, scale, arch in product(train.seeds, train.scales, suite.archs):
            plan = replace(
                train, scale=scale, learning_rates=train.rates_at(scale),
                seeds=train.seeds[:1], ladder=(),
            )  # fmt: skip
            spec = suite.trained_model(arch, scale, suite.corpus.vocab_size)
            yield train_point(spec, suite.corpus, plan, suite.quality, seed, device)
    if recall is not None:
        for seed, arch in product(recall.seeds, suite.archs):
            options = asdict(replace(recall, seeds=(seed,), overrides={}))
            yield _of(suite.mqar_model(arch), "mqar", device, "mqar", options, seed=seed)
    for decode in suite.decode:
        for batch, arch in product(decode.batches, suite.archs):
            no_cache = decode.no_cache if batch == min(decode.batches) else 0
            spec = suite.model(arch, get_scale(decode.scale))
            yield decode_point(spec, replace(decode, no_cache=no_cache), batch, device)


def train_point(
    spec: ModelSpec, corpus: CorpusPlan, plan: TrainPlan, quality: QualityPlan | None, seed: int,
    device: str,
) -> Point:  # fmt: skip
    """Training on text at the plan's own scale, whose first seed is that of its sweep."""
    options = {"corpus": corpus, "plan": plan, "quality": quality}
    return _of(spec, "train", device, plan.scale, _plain(options), seed=seed)


def decode_point(spec: ModelSpec, plan: DecodePlan, batch: int, device: str) -> Point:
    """Decode of one of the plan's batches on a kind of device."""
    options = asdict(replace(plan, batches=(batch,)))
    return _of(spec, "decode", device, plan.scale, options, batch=batch)


def _of(
    spec: ModelSpec, stage: str, device: str, scale: str, options: dict[str, Any], **more: int
) -> Point:
    return Point(
        stage=stage, arch=spec.arch, scale=scale, device=device, model=asdict(spec),
        source=spec.source_digest(), options=options, **more,
    )  # fmt: skip


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else asdict(value) for name, value in options.items()}


def weight(point: Point, trained_scales: list[str]) -> float:
    """Roughly how long a point takes relative to others."""
    options = point.options
    match point.stage:
        case "hardware":
            return 3.0
        case "cost":
            return 0.3
        case "train":
            plan = options["plan"]
            steps = plan["steps"]
            rates = len(plan["learning_rates"])
            if point.seed == plan["seeds"][0] and rates > 1:
                steps = rates * plan["sweep_steps"] + steps * (plan["sweep_steps"] != steps)
            return 0.14 * steps
        case "mqar":
            return 0.02 * options["steps"]
        case _:
            return 0.5 if point.scale in trained_scales else 5.0
