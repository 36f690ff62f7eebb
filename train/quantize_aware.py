"""Train with weights rounded as they will be stored, so that they learn to stand it.

Products see the rounded weights, and their gradients go to the weights themselves as if nothing
had been rounded (straight-through, arXiv 1308.3432). The embedding, the head, and inputs of 8 bits
are not rounded meanwhile: in so many bits they hardly differ.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from archs.backbone import Model
from archs.layers import Projection
from archs.packed import as_rounded, require_group
from archs.registry import ModelSpec
from archs.storage import runs
from archs.weights import WeightFormat
from train.loop import StepReport, TrainResult, train
from train.recipe import Recipe
from train.tokens import Batches, TokenSet


@contextmanager
def seen_rounded(model: Model, stored: WeightFormat) -> Iterator[None]:
    """Within it, the projections' products see their weights as `stored` would have them.

    Raises UserError for a group that is wider than a matrix' rows.
    """
    rounding = [
        m
        for block in model.layers
        for m in block.modules()
        if isinstance(m, Projection) and not m.plain
    ]
    for projection in rounding:
        for gates, _ in runs(projection):
            require_group(stored.gates if gates else stored.matrices, projection.weight.shape)
    try:
        for projection in rounding:
            projection.view = partial(_straight, projection=projection, stored=stored)
        yield
    finally:
        for projection in rounding:
            projection.view = None


def _straight(weight: Tensor, *, projection: Projection, stored: WeightFormat) -> Tensor:
    """The rounded weights, whose gradient is the weights' own."""
    with torch.no_grad():
        parts, at = [], 0
        for gates, size in runs(projection):
            number = stored.gates if gates else stored.matrices
            rows = weight[at : at + size]
            parts.append(rows if number.plain else as_rounded(rows, number))
            at += size
        away = torch.cat(parts) - weight
    return weight + away


def tune(
    model: Model, tokens: TokenSet, recipe: Recipe, folder: Path, *, spec: ModelSpec, steps: int,
    rate: float, stored: WeightFormat | None, seed: int,
    progress: Callable[[StepReport], None] | None = None, deadline: float | None = None,
) -> TrainResult:  # fmt: skip
    """Train a model of a recipe on, in place, for `steps` at `rate` times its learning rate.

    stored: what products see the weights rounded to; None: nothing is rounded. seed: of the order
    of the text. Raises UserError as `seen_rounded` and `train`.
    """
    own = recipe.continued(steps=steps, rate=rate, seed=seed)
    text = Batches(tokens, batch=own.batch, seq_len=own.seq_len, seed=seed)

    def go() -> TrainResult:
        return train(
            model, text, own, folder, spec=spec, data_fingerprint=tokens.name, progress=progress,
            deadline=deadline,
        )  # fmt: skip

    if stored is None:
        return go()
    with seen_rounded(model, stored):
        return go()
