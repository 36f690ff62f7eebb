"""A trained model with its weights stored in few bits: what that costs, and what it takes.

Quality is that of the stored numbers, computed in float32, so that formats differ in nothing else;
time per token is that of one sequence on the products that read them as they are stored.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archs.backbone import Model, cast
from archs.backends import resolve_backend
from archs.checks import parse
from archs.ops.matrix import weights_of
from archs.registry import ModelSpec
from archs.weights import WeightFormat
from eval.measure.agreement import COMPANY, agreement
from eval.measure.cell_rows import estimate_row, load_rows, reporter, timing_rows
from eval.measure.decode import decode_cost, measure_decode
from eval.measure.decode_plans import CompressPlan
from eval.measure.gate import agreed_rows
from eval.measure.progress import Watch
from eval.measure.quality import DocumentScore, document_scores, over_documents
from eval.measure.site import Failure, Site, about, fitting
from eval.measure.suite import CorpusPlan, QualityPlan
from eval.measure.trained import Source, Trained, trained
from eval.predict.neighbours import Neighbours
from eval.predict.roofline import resident_bytes
from eval.results.point import Point
from eval.results.rows import About, Found, Row, Status
from eval.results.statistics import weighted_mean
from train.checkpoint import read_metadata, save_compressed
from train.compress import compress
from train.loop import CHECKPOINT_NAME
from train.quantize_aware import tune
from train.rounding import WAYS
from train.tokens import Batches

#: Seed of the calibration text, apart from those that models are trained with.
CALIBRATION_SEED = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressOptions:
    """plan: of one format."""

    source: Source
    corpus: CorpusPlan
    plan: CompressPlan
    quality: QualityPlan


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Bits per byte, bytes in memory and time per token of the model in the format.

    Raises UserError on a checkpoint whose weights are packed already, and Failure, "unsupported",
    on a format that the model's matrices do not take.
    """
    options = parse(CompressOptions, point.options, f"the options of {point.key}")
    plan = options.plan
    stored = WeightFormat.named(plan.weights[0])
    given = trained(options.source, options.corpus, site, watch)
    seq_len = given.spec.scale.seq_len
    backend = resolve_backend(plan.backend, site.device)
    label: dict[str, Any] = {
        "kernel_backend": backend, "corpus": options.corpus.spec, "tokens": given.seen,
    }  # fmt: skip
    asked = replace(about(given.spec, given.model, **label), weight_format=str(stored))
    control = given.model
    with fitting(lambda: asked):
        if stored.method == "qat":
            control = _tuned(given, None, options, point, site, watch)
            given = replace(given, model=_tuned(given, stored, options, point, site, watch))
        before = scores(control, given, options.quality)
        model = stored_model(given, stored, plan.calibration)
    if site.keeps:
        save_compressed(site.work_folder(point) / CHECKPOINT_NAME, model, given.checkpoint)
    watch.at(0.3, "score")
    # Both figures are of one model: the columns say how it is stored and what it is served in.
    told = about(given.spec, model, **label)
    held, bits = resident_bytes(model), weight_bits(model)
    after = scores(cast(model, torch.float32), given, options.quality)
    scored = estimate_row("compressed_bits_per_byte", over_documents(after), context=seq_len)
    at: dict[str, Any] = {"batch": 1, "context": seq_len}
    rows = [
        scored, ratio_row(before, after),
        Row(measure="held_weight_bytes", value=held, **at), bits,
    ]  # fmt: skip
    watch.at(0.7, "decode")
    try:
        rows += timed_alone(
            cast(model, stored.dtype), given.spec, plan, site, backend, told
        )  # fmt: skip
    except Failure as failure:
        # What the numbers are worth does not depend on the step that reads them.
        (why,) = failure.found.rows
        rows.append(replace(why, measure="tpot_ms", **at))
    return Found(about=told, rows=tuple(rows))


def weight_bits(model: Model) -> Row:
    """Bits of memory a weight, of all weights and their scales."""
    numbers = sum(weight.numel() for weight in weights_of(model))
    return Row(measure="bits_per_weight", value=8 * resident_bytes(model) / numbers)


def _tuned(
    given: Trained, stored: WeightFormat | None, options: CompressOptions, point: Point, site: Site,
    watch: Watch,
) -> Model:  # fmt: skip
    """A copy of the model, trained on; stored: seen rounded meanwhile. Raises Failure."""
    plan = options.plan
    model = deepcopy(given.model)
    recipe = read_metadata(given.checkpoint).identity.recipe
    with TemporaryDirectory() as folder:
        result = tune(
            model, given.tokens, recipe, Path(folder), spec=given.spec, steps=plan.qat_steps,
            rate=plan.qat_rate, stored=stored, seed=CALIBRATION_SEED + point.seed,
            progress=reporter(watch), deadline=site.deadline,
        )  # fmt: skip
    if result.status != "ok":
        raise Failure(
            Status.NAN, about(given.spec, given.model, corpus=options.corpus.spec),
            f"training on {result.status} at step {result.steps}",
            stopped=result.status == "stopped",
        )  # fmt: skip
    return model.eval()


def scores(model: Model, given: Trained, quality: QualityPlan) -> list[DocumentScore]:
    """The held-out documents in windows of the trained length."""
    return document_scores(
        model, given.tokens, part="test", seq_len=given.spec.scale.seq_len,
        max_tokens=quality.max_tokens or None,
    )  # fmt: skip


def ratio_row(before: Sequence[DocumentScore], after: Sequence[DocumentScore]) -> Row:
    """Bits after over bits before, with the interval over the documents that both are of."""
    bits = np.array([score.bits for score in before])
    ratios = np.array([score.bits for score in after]) / bits
    if len(ratios) < 2:
        return Row(measure="bits_per_byte_ratio", value=float(ratios.mean()), n=len(ratios))
    found = weighted_mean(ratios, bits)
    return Row(
        measure="bits_per_byte_ratio", value=found.value, low=found.value - found.half,
        high=found.value + found.half, n=len(ratios),
    )  # fmt: skip


def stored_model(given: Trained, stored: WeightFormat, calibration: int) -> Model:
    """A trained model, stored anew in place; text that codes are chosen by is its own training's.

    calibration: sequences of that text.
    """
    ids = calibration_text(given, calibration) if stored.method in WAYS else None
    return compress(given.model, stored, ids)


def calibration_text(given: Trained, sequences: int) -> Tensor:
    """So many sequences of the text that a model was trained on, int64 [B, T]."""
    text = Batches(
        given.tokens, batch=sequences, seq_len=given.spec.scale.seq_len, seed=CALIBRATION_SEED
    )
    return text.batch_at(0)[0].to(given.model.embedding.weight.device)


def timed_alone(
    model: Model, spec: ModelSpec, plan: CompressPlan, site: Site, backend: str, told: About
) -> list[Row]:
    """Decode of one sequence at the trained length, once it is shown to be right; else Failure."""
    context = spec.scale.seq_len
    # Several sequences make the limit, the worst position's rounding, a surer one.
    agree = partial(agreement, model, context=context, batches=(1, COMPANY), backend=backend)
    rows = agreed_rows(agree, told)
    with Neighbours() as others:
        (timing,) = measure_decode(
            model, batch=1, contexts=(context,), steps=plan.steps, backend=backend
        )
        rates = site.rates_of([model], (1,), ran_by=backend, again=True)
    rows += load_rows(others.share, batch=1)
    return [*rows, *timing_rows(timing, decode_cost(model, 1, timing.context), rates)]
