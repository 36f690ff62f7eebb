"""The points of a suite, in the order in which they are measured."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from archs.errors import UserError
from archs.registry import ModelSpec, pattern_of
from archs.sizes import get_scale
from archs.state_formats import KINDS, StateFormat
from archs.storage import state_kinds
from archs.weights import WeightFormat
from eval.measure.cost import CONTEXTS
from eval.measure.decode_plans import CompressPlan, DecodePlan, SpeculatePlan
from eval.measure.serve_plan import ServePlan, batch_sizes
from eval.measure.suite import (
    CorpusPlan,
    QualityPlan,
    Suite,
    TrainPlan,
    without_later,
    without_unused,
)
from eval.measure.trained import Source
from eval.results.point import Point
from train.checkpoint import read_metadata, read_spec
from train.identity import Identity
from train.recipe import LATER

#: Fields of plans that came later: how weights are stored and states kept.
STORED = ("weights", "state")


def points(suite: Suite, device: str) -> Iterator[Point]:
    """All points of a suite on a kind of device (cpu, cuda).

    They go stage by stage, so that a short time budget leaves every architecture with the same
    columns.
    """
    rows = {b for plan in suite.decode for b in plan.batches}
    rows |= {b for plan in suite.serve for b in batch_sizes(plan.max_sequences)}
    yield Point(stage="hardware", device=device, options={"rows": sorted(rows)})
    for arch, scale in product(suite.archs, suite.scales):
        yield _of(
            suite.model(arch, get_scale(scale)), "cost", device, scale, {"contexts": [*CONTEXTS]}
        )
    train = suite.train
    if train is not None:
        for seed, scale, arch in product(train.seeds, train.scales, suite.archs):
            yield _trained(suite, arch, scale, seed, device)
        yield from _speculations(suite, device)
        yield from _compressions(suite, device)
    for task in suite.asked:
        for seed, arch in product(task.seeds, suite.archs):
            spec = task.model(arch, suite.overrides)
            yield _of(spec, "task", device, task.NAME, asdict(task.of_one(seed)), seed=seed)
    yield from _recalls(suite, device)
    for decode in suite.decode:
        for batch, arch in product(decode.batches, suite.archs):
            no_cache = decode.no_cache if batch == min(decode.batches) else 0
            spec = suite.model(arch, get_scale(decode.scale))
            yield decode_point(spec, replace(decode, no_cache=no_cache), batch, device)
    for serve, arch in product(suite.serve, suite.archs):
        yield serve_point(suite.model(arch, get_scale(serve.scale)), serve, device)


def _trained(suite: Suite, arch: str, scale: str, seed: int, device: str) -> Point:
    """Training of one of a suite's models."""
    train = suite.train
    assert train is not None
    plan = replace(
        train, scale=scale, learning_rates=train.rates_at(scale), seeds=train.seeds[:1], ladder=()
    )
    spec = suite.trained_model(arch, scale, suite.corpus.vocab_size)
    return train_point(spec, suite.corpus, plan, suite.quality, seed, device)


def _speculations(suite: Suite, device: str) -> Iterator[Point]:
    """Speculation of the first seed's models, once they are trained."""
    assert suite.train is not None
    seed = suite.train.seeds[0]

    def source(arch: str, scale: str) -> Source:
        return Source(point=asdict(_trained(suite, arch, scale, seed, device)))

    for plan in suite.speculate:
        draft = None if plan.drafting is None else source(*plan.drafting)
        for arch in plan.targets or suite.archs:
            spec = suite.trained_model(arch, suite.train.scale, suite.corpus.vocab_size)
            target = source(arch, suite.train.scale)
            yield from speculate_points(spec, target, draft, suite.corpus, plan, seed, device)


def _compressions(suite: Suite, device: str) -> Iterator[Point]:
    """The trained models of the suite's own scale in each format, seed by seed."""
    train = suite.train
    assert train is not None
    quality = suite.quality or QualityPlan()
    for plan, seed in product(suite.compress, train.seeds):
        for arch in plan.archs or suite.archs:
            spec = suite.trained_model(arch, train.scale, suite.corpus.vocab_size)
            source = Source(point=asdict(_trained(suite, arch, train.scale, seed, device)))
            yield from compress_points(spec, source, suite.corpus, plan, quality, seed, device)


def compress_points(
    spec: ModelSpec, source: Source, corpus: CorpusPlan, plan: CompressPlan, quality: QualityPlan,
    seed: int, device: str,
) -> Iterator[Point]:  # fmt: skip
    """One trained model in each of the plan's formats."""
    for stage, own in each_format(spec, plan):
        options = {"source": source, "corpus": corpus, "plan": own, "quality": quality}
        yield _of(spec, stage, device, spec.scale.name, _plain(options), batch=1, seed=seed)


def each_format(spec: ModelSpec, plan: CompressPlan) -> Iterator[tuple[str, CompressPlan]]:
    """The plan of each format, and the stage that takes it: of states those that a model has."""
    own = replace(plan, archs=(), tasks=())
    for weights in plan.weights:
        yield "compress", replace(own, weights=(weights,), state=(), prune=())
    kinds = state_kinds(spec.outline())
    found = (str(StateFormat.named(name).of_kinds(kinds)) for name in plan.state)
    for state in filter(None, dict.fromkeys(found)):
        yield "state", replace(own, weights=(), state=(state,), prune=())
    for name in plan.prune:
        yield "prune", replace(own, weights=(), state=(), prune=(name,))


def require_kinds(spec: ModelSpec, state: Iterable[str]) -> None:
    """Raise UserError for a format of a state that a model does not have."""
    kinds = state_kinds(spec.outline())
    for name in state:
        if not StateFormat.named(name).of_kinds(kinds).kept:
            raise UserError(
                f"state format '{name}' is of nothing that {spec.arch} remembers; it has "
                f"{', '.join(kind for kind in KINDS if kind in kinds)}"
            )


def _recalls(suite: Suite, device: str) -> Iterator[Point]:
    """The models of the tasks that a plan names in each of its formats."""
    for plan in suite.compress:
        for task in (t for t in suite.asked if t.NAME in plan.tasks):
            for seed, arch in product(task.seeds, plan.archs or suite.archs):
                spec = task.model(arch, suite.overrides)
                taught = _of(spec, "task", device, task.NAME, asdict(task.of_one(seed)), seed=seed)
                for stage, own in each_format(spec, plan):
                    aware = any(WeightFormat.named(name).method == "qat" for name in own.weights)
                    if aware or stage == "prune":
                        continue
                    options = {"task": asdict(taught), "plan": _stored(own)}
                    yield _of(spec, "recall", device, task.NAME, options, seed=seed)


def speculate_points(
    spec: ModelSpec, target: Source, draft: Source | None, corpus: CorpusPlan, plan: SpeculatePlan,
    seed: int, device: str,
) -> Iterator[Point]:  # fmt: skip
    """Speculation on one target: a point for each batch and K."""
    for batch, drafts in product(plan.batches, plan.drafts):
        own = replace(plan, batches=(batch,), drafts=(drafts,), targets=())
        options = {"target": target, "draft": draft, "corpus": corpus, "plan": own}
        yield _of(
            spec, "speculate", device, spec.scale.name, _plain(options), batch=batch, seed=seed
        )


def train_point(
    spec: ModelSpec, corpus: CorpusPlan, plan: TrainPlan, quality: QualityPlan | None, seed: int,
    device: str,
) -> Point:  # fmt: skip
    """Training on text at the plan's own scale, whose first seed is that of its sweep."""
    options = {"corpus": corpus, "plan": plan, "quality": quality}
    return _of(spec, "train", device, plan.scale, _plain(options), seed=seed)


def quality_point(
    checkpoint: Path, corpus: str, quality: QualityPlan, device: str, arch: str | None = None,
    state: str = "",
) -> Point:  # fmt: skip
    """What held-out text says of a checkpoint's model.

    arch: the architecture file of a checkpoint that was trained from one. state: the format that
    its state is kept in.
    Raises UserError where there is no checkpoint of ours, and as `require_kinds`.
    """
    metadata = read_metadata(checkpoint)
    identity = metadata.identity
    if state:
        require_kinds(read_spec(checkpoint, arch), [state])
    options = {
        "checkpoint": str(checkpoint), "step": metadata.progress.step, "arch": arch,
        "corpus": asdict(corpus_of(identity, corpus)),
        "quality": asdict(quality),
    }  # fmt: skip
    options |= {"state": state} if state else {}
    return Point(
        stage="quality", arch=arch or identity.spec.arch, scale=identity.spec.scale.name,
        seed=identity.recipe.seed, device=device, model=asdict(identity.spec),
        source=identity.source, options=options,
    )  # fmt: skip


def corpus_of(identity: Identity, corpus: str) -> CorpusPlan:
    """A corpus with the size of vocabulary that a checkpoint's tokenizer was asked for."""
    # A small corpus fills less of the vocabulary than was asked for; the tokens' name keeps that.
    asked = re.match(r"bpe(\d+)-", identity.data)
    vocab_size = int(asked[1]) if asked else identity.spec.scale.vocab_size
    return CorpusPlan(spec=corpus, vocab_size=vocab_size)


def decode_point(spec: ModelSpec, plan: DecodePlan, batch: int, device: str) -> Point:
    """Decode of one of the plan's batches on a kind of device."""
    options = without_later(asdict(replace(plan, batches=(batch,))), STORED)
    return _of(spec, "decode", device, plan.scale, options, batch=batch)


def serve_point(spec: ModelSpec, plan: ServePlan, device: str) -> Point:
    """Serving of one model by all of the plan's policies."""
    load = plan.load
    options = {
        "plan": without_later(asdict(plan), STORED), "workload": asdict(load),
        "trace_digest": load.trace_digest,
    }  # fmt: skip
    return _of(spec, "serve", device, plan.scale, options, batch=plan.max_sequences)


def _of(
    spec: ModelSpec, stage: str, device: str, scale: str, options: dict[str, Any], **more: int
) -> Point:
    return Point(
        stage=stage, arch=spec.arch, scale=scale, device=device, model=asdict(spec),
        source=spec.source_digest(), options=options, **more,
    )  # fmt: skip


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    plain = {name: None if value is None else asdict(value) for name, value in options.items()}
    match options.get("plan"):
        case CompressPlan() as plan:
            plain["plan"] = _stored(plan)
        case SpeculatePlan() as plan:
            plain["plan"] = without_later(asdict(plan), STORED)
    return {name: value and without_later(value, LATER) for name, value in plain.items()}


def _stored(plan: CompressPlan) -> dict[str, Any]:
    """As plain data, without what came later where it plays no part."""
    return without_unused(asdict(plan))


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
        case "task":
            period = sum(layers.count for layers in pattern_of(point.arch))
            return 0.01 * options["steps"] * max(options["n_layers"], period)
        case "speculate":
            return 0.1 * options["plan"]["new_tokens"] * len(options["plan"]["contexts"])
        case "compress":
            plan = options["plan"]
            aware = any(WeightFormat.named(name).method == "qat" for name in plan["weights"])
            return 1.5 + 0.3 * aware * plan["qat_steps"]
        case "state":
            return 20.0 if "memory" in options["plan"]["state"][0] else 3.0
        case "recall":
            return 1.5
        case "prune":
            return 2.0 + 0.5 * options["plan"]["distil_steps"]
        case "serve":
            plan = options["plan"]
            runs = len(plan["batching"]) * plan["repeats"]
            # Of a trace, that may be read whole, nobody has counted them.
            return 0.3 * (options["workload"]["requests"] or 100) * runs
        case _:
            return 0.5 if point.scale in trained_scales else 5.0
