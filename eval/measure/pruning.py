"""A trained model made smaller, and what brings its loss back: its parent's word, text, or nothing.

Each smaller model is scored as it is pruned, trained on with its parent (distillation), trained on
as long without it, and, where its shape is smaller, trained from scratch for as long: at equal
tokens of the same text in the same order. All are held against the parent, document by document.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from archs.backbone import Model
from archs.backends import resolve_backend
from archs.checks import parse
from archs.registry import ModelSpec
from eval.measure.cell_rows import estimate_row, reporter
from eval.measure.compressing import (
    CALIBRATION_SEED,
    calibration_text,
    ratio_row,
    scores,
    timed_alone,
)
from eval.measure.decode_plans import CompressPlan
from eval.measure.progress import Watch
from eval.measure.quality import over_documents
from eval.measure.site import Failure, Site, about, fitting
from eval.measure.suite import CorpusPlan, QualityPlan
from eval.measure.threads import one_thread
from eval.measure.trained import Source, Trained, trained
from eval.predict.roofline import resident_bytes
from eval.results.point import Point
from eval.results.rows import Found, Row, Status
from train.checkpoint import read_metadata, save_pruned
from train.distill import Distillation, distil
from train.loop import CHECKPOINT_NAME
from train.prune import Plan, prune
from train.sparse import Sparsity, is_sparsity, kept_zero, sparsify


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneOptions:
    """plan: of one way to prune."""

    source: Source
    corpus: CorpusPlan
    plan: CompressPlan
    quality: QualityPlan


@dataclass(frozen=True, slots=True)
class Pruned:
    """A smaller model, and what stays of its matrices where it is sparse instead."""

    model: Model
    spec: ModelSpec
    masks: Mapping[str, Tensor]

    @classmethod
    def of(cls, given: Trained, name: str, ids: Tensor) -> "Pruned":
        """By the plan of that name. Raises MisfitError where it does not fit the model."""
        if is_sparsity(name):
            model = deepcopy(given.model)
            return cls(model, given.spec, sparsify(model, Sparsity.named(name), ids))
        return cls(*prune(given.model, given.spec, Plan.named(name), ids), {})


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Bits per byte before and after training on, in each way, bytes and time per token."""
    options = parse(PruneOptions, point.options, f"the options of {point.key}")
    plan, name = options.plan, options.plan.prune[0]
    given = trained(options.source, options.corpus, site, watch)
    seq_len = given.spec.scale.seq_len
    ids = calibration_text(given, plan.calibration)
    backend = resolve_backend(plan.backend, site.device)
    label: dict[str, Any] = {
        "kernel_backend": backend, "corpus": options.corpus.spec, "tokens": given.seen,
        "options": f"prune={name}",
    }  # fmt: skip
    with one_thread(), fitting(lambda: about(given.spec, given.model, **label)):
        pruned = Pruned.of(given, name, ids)
        before = scores(given.model, given, options.quality)
    told = about(pruned.spec, pruned.model, **label)
    rows: list[Row] = []

    def score(model: Model, how: str) -> None:
        after = scores(model.eval(), given, options.quality)
        found = estimate_row("compressed_bits_per_byte", over_documents(after), context=seq_len)
        words = f"prune={name} train={how}"
        rows.extend(replace(row, options=words) for row in (found, ratio_row(before, after)))

    training = _Training(given, pruned, point, site, options, told)
    with one_thread():
        score(pruned.model, "none")
        for number, (how, train) in enumerate(training.ways.items()):
            watch.at(0.1 + 0.8 * number / len(training.ways), how)
            model = train(watch)
            score(model, how)
            if how == "distil" and site.keeps:
                path = site.work_folder(point) / CHECKPOINT_NAME
                save_pruned(path, model, pruned.spec, name, given.checkpoint)
    at: dict[str, Any] = {"batch": 1, "context": seq_len}
    rows += [
        Row(measure="held_weight_bytes", value=resident_bytes(pruned.model), **at),
        Row(measure="state_bytes", value=pruned.model.state_bytes(seq_len), **at),
    ]
    watch.at(0.95, "decode")
    try:
        rows += timed_alone(pruned.model, pruned.spec, plan, site, backend, told)
    except Failure as failure:
        (why,) = failure.found.rows
        rows.append(replace(why, measure="tpot_ms", **at))
    return Found(about=told, rows=tuple(rows))


@dataclass(frozen=True, slots=True)
class _Training:
    """How a pruned model is trained on, each way from the same start."""

    given: Trained
    pruned: Pruned
    point: Point
    site: Site
    options: PruneOptions
    told: Any

    @property
    def ways(self) -> dict[str, Callable[[Watch], Model]]:
        """By name: with the parent's word, without, and from scratch where there is a shape."""
        found: dict[str, Callable[[Watch], Model]] = {
            "distil": lambda watch: self._on(self.given.model, watch),
            "text": lambda watch: self._on(None, watch),
        }
        if not self.pruned.masks:
            found["scratch"] = self._from_scratch
        return found if self.options.plan.distil_steps else {}

    def _on(self, parent: Model | None, watch: Watch) -> Model:
        model = deepcopy(self.pruned.model)
        return self._train(model, parent, self.options.plan.distil_rate, watch)

    def _from_scratch(self, watch: Watch) -> Model:
        seed, device = self.point.seed, str(self.site.device)
        return self._train(self.pruned.spec.build(seed=seed, device=device), None, 1.0, watch)

    def _train(self, model: Model, parent: Model | None, rate: float, watch: Watch) -> Model:
        """In place, on text that neither codes nor the parent saw in this order."""
        given, plan = self.given, self.options.plan
        recipe = read_metadata(given.checkpoint).identity.recipe
        masks = self.pruned.masks
        with TemporaryDirectory() as folder, kept_zero(model, masks) if masks else nullcontext():
            result = distil(
                model.train(), given.tokens, recipe, Path(folder), spec=self.pruned.spec,
                steps=plan.distil_steps, rate=rate, parent=parent,
                seed=CALIBRATION_SEED + self.point.seed,
                how=Distillation(temperature=plan.distil_temperature, weight=plan.distil_weight),
                progress=reporter(watch), deadline=self.site.deadline,
            )  # fmt: skip
        if result.status != "ok":
            raise Failure(
                Status.NAN,
                self.told,
                f"training on {result.status} at step {result.steps}",
                stopped=result.status == "stopped",
            )
        return model
