"""Recall in few bits: a task's trained model, its weights or its state stored otherwise.

Held-out text hardly asks for what lies far back; a task does. Its model is trained in full
precision, once for all formats, and answers through a store.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from archs.backbone import Model, cast
from archs.checks import parse
from archs.weights import WeightFormat
from eval.measure.cell_rows import estimate_row
from eval.measure.compressing import weight_bits
from eval.measure.decode_plans import CompressPlan
from eval.measure.keeping import kept_as, state_bits, state_numbers
from eval.measure.progress import Watch
from eval.measure.site import Site, about, fitting
from eval.measure.task import Taught, teach
from eval.measure.threads import one_thread
from eval.results.point import Point
from eval.results.rows import About, Found
from eval.tasks.score import accuracy
from eval.tasks.task import TaskBatches
from train.compress import compress
from train.rounding import WAYS


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallOptions:
    """task: the point that trains the model, as plain data. plan: of one format."""

    task: dict[str, Any]
    plan: CompressPlan


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Accuracy on the task in the format, and how much of it is lost."""
    options = parse(RecallOptions, point.options, f"the options of {point.key}")
    plan = options.plan
    taught = teach(Point(**options.task), site, watch)
    task, model = taught.task, taught.model.eval()

    def told(model: Model) -> About:
        found = about(taught.spec, model, corpus=task.NAME, options=task.asked)
        return replace(found, tokens=taught.about.tokens, kernel_backend="torch")

    if plan.weights:
        asked = replace(told(model), weight_format=str(WeightFormat.named(plan.weights[0])))
        with fitting(lambda: asked):
            model = _stored(taught, plan, point.seed)
        bits = weight_bits(model)
        model = cast(model, torch.float32)
    else:
        numbers = state_numbers(model, task.seq_len)
        model = kept_as(model, plan.state[0], told)
        bits = state_bits(model, task.seq_len, numbers)
    watch.at(0.5, "answer")
    with one_thread():
        found = accuracy(
            model, task, split="test", sequences=task.test_sequences, seed=point.seed,
            stored=bool(plan.state),
        )  # fmt: skip
    described = replace(told(model), dtype="float32")
    scored = estimate_row("compressed_accuracy", found, context=task.seq_len)
    return Found(about=described, rows=(scored, bits))


def _stored(taught: Taught, plan: CompressPlan, seed: int) -> Model:
    """The model with its weights in the format, codes chosen by sequences of its training."""
    stored = WeightFormat.named(plan.weights[0])
    ids = None
    if stored.method in WAYS:
        ids = TaskBatches(taught.task, seed).batch_at(0)[0]
        ids = ids.to(taught.model.embedding.weight.device)
    return compress(taught.model, stored, ids)
