"""Structured pruning: a trained model's least important layers, heads, channels or states go.

Importance comes from activations on calibration text alone, with no gradients: block influence
for layers (ShortGPT, arXiv 2403.03853) and activation norms for all else (Minitron, arXiv
2407.14679). What is left is a dense model (`archs.narrow`); norms over fewer channels are fitted so
that their outputs keep their size on that text. Training on (`train.distill`) is up to the caller.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Self

import torch
from torch import Tensor

from archs.axes import Axis
from archs.backbone import Model
from archs.checks import require_some
from archs.errors import MisfitError, UserError, unknown_name
from archs.mixer import Shared
from archs.narrow import (
    Choice,
    axes_of,
    folded,
    teams,
    without_channels,
    without_layers,
    without_units,
)
from archs.registry import ModelSpec
from train.importance import channel_importance, least_influential, unit_importance
from train.observe import Observed, Sums, observe, pieces, watched

#: What every model has, beside its mixers' own axes.
LAYERS, WIDTH = "layers", "width"
#: The first axis of each mixer that makes its state smaller.
STATE = "state"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """One cut. axis: `layers`, `width`, `mlp`, `state`, or an axis that some mixer names.

    amount: how many layers are removed, or the share that is kept of anything else.
    """

    axis: str
    amount: Fraction

    def __post_init__(self) -> None:
        if self.axis == LAYERS:
            if self.amount < 1 or self.amount.denominator > 1:
                raise UserError(
                    f"'{self}' must remove a whole number of layers, at least 1, as in layers:2"
                )
        elif not 0 < self.amount < 1:
            raise UserError(
                f"'{self}' must keep a share between 0 and 1, both excluded, as in {self.axis}:0.5"
            )

    @classmethod
    def named(cls, name: str) -> Self:
        """`AXIS:AMOUNT`, the amount as 0.5 or 3/4. Raises UserError on anything else."""
        axis, _, amount = name.partition(":")
        try:
            return cls(axis=axis, amount=Fraction(amount))
        except (ValueError, ZeroDivisionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"cut '{name}' is not AXIS:AMOUNT; write layers:2, heads:0.5 or mlp:3/4, say"
            ) from None

    def __str__(self) -> str:
        exact = str(float(self.amount))
        whole = self.amount.denominator == 1
        amount = exact if Fraction(exact) == self.amount and not whole else str(self.amount)
        return f"{self.axis}:{amount}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Cuts, one after the other: each sees the model that the one before left."""

    cuts: tuple[Cut, ...]

    def __post_init__(self) -> None:
        require_some("axes of a plan", [cut.axis for cut in self.cuts])

    @classmethod
    def named(cls, name: str) -> Self:
        """Cuts with commas between them, as in `layers:1,mlp:0.5`. Raises UserError as `Cut`."""
        return cls(cuts=tuple(Cut.named(part.strip()) for part in name.split(",")))

    def __str__(self) -> str:
        return ",".join(map(str, self.cuts))


@torch.no_grad()
def prune(model: Model, spec: ModelSpec, plan: Plan, ids: Tensor) -> tuple[Model, ModelSpec]:
    """A smaller model and its spec; the given one stays as it is.

    ids: calibration text, int64 [B, T]. Raises MisfitError on an axis that no layer has, on a share
    that leaves no whole number of units and on layers that cannot be removed, UserError on packed
    weights and on text that is none.
    """
    for cut in plan.cuts:
        model, spec = _cut(model, spec, cut, ids)
    return model, spec


def _cut(model: Model, spec: ModelSpec, cut: Cut, ids: Tensor) -> tuple[Model, ModelSpec]:
    if cut.axis == LAYERS:
        tied, wanted = teams(model), int(cut.amount)
        seen = observe(model, ids)
        return without_layers(model, spec, least_influential(seen.influence, tied, wanted))
    if cut.axis == WIDTH:
        left = _left(cut, spec.scale.d_model, "channels of the model's width")
        seen = observe(model, ids)
        kept = _top(channel_importance(seen), 1, left)
        smaller, its = without_channels(model, spec, kept)
        for name, sums in seen.streams.items():
            ratio = sums.mean_square[kept].mean() / sums.mean_square.mean()
            smaller.get_parameter(f"{name}.weight").mul_(_root(ratio))
        return smaller, its
    chosen = _choose(model, spec, cut, partial(observe, model, ids))
    parent = folded(model, chosen)
    smaller, its = without_units(parent, spec, chosen)
    _fit_norms(parent, smaller, chosen, ids)
    return smaller, its


def _choose(model: Model, spec: ModelSpec, cut: Cut, look: Callable[[], Observed]) -> list[Choice]:
    """The most important units of the axis in every layer that has it."""
    axes = {layer: _axis(axes_of(block), cut.axis) for layer, block in enumerate(model.layers)}
    found = {layer: axis for layer, axis in axes.items() if axis is not None}
    if not found:
        known = {STATE, LAYERS, WIDTH}.union(*(axes_of(block) for block in model.layers))
        known -= set() if any(_axis(axes_of(b), STATE) for b in model.layers) else {STATE}
        raise MisfitError(str(unknown_name(f"axis of {spec.arch}", cut.axis, known)))
    left = {at: _left(cut, axis.per_group, _units(axis)) for at, axis in found.items()}
    seen = look()
    scores = {at: unit_importance(model, at, axis, seen) for at, axis in found.items()}
    for team in teams(model):
        members = [layer for layer in team if layer in found and found[layer].kind == "state"]
        if members:
            together = torch.stack([scores[member] for member in members]).sum(0)
            scores |= dict.fromkeys(members, together)
    return [
        Choice(layer=at, axis=axis, units=_top(scores[at], axis.groups, left[at]))
        for at, axis in found.items()
    ]


def _axis(axes: dict[str, Axis], name: str) -> Axis | None:
    if name == STATE:
        return next((axis for axis in axes.values() if axis.kind == "state"), None)
    return axes.get(name)


def _units(axis: Axis) -> str:
    return f"{axis.name} units" + (f" in each of {axis.groups} groups" if axis.groups > 1 else "")


def _left(cut: Cut, count: int, what: str) -> int:
    left = cut.amount * count
    if left.denominator != 1:
        below = int(left)
        near = [n for n in (below, below + 1) if 0 < n < count]
        remedy = " or ".join(f"{cut.axis}:{Fraction(n, count)}" for n in near)
        raise MisfitError(
            f"'{cut}' keeps {float(left):g} of {count} {what}, which is no whole number; "
            + (f"take {remedy}" if remedy else "leave this axis as it is")
        )
    return int(left)


def _top(scores: Tensor, groups: int, count: int) -> Tensor:
    """The units of most importance in each group, ascending: int64 [groups · count]."""
    by_group = scores.view(groups, -1)
    best = torch.sort(by_group, dim=1, descending=True, stable=True).indices[:, :count]
    start = torch.arange(groups, device=best.device)[:, None] * by_group.shape[1]
    return (best + start).flatten().sort().values.cpu()


def _fit_norms(parent: Model, child: Model, choices: Sequence[Choice], ids: Tensor) -> None:
    """Scale norms over fewer channels so that their readers' inputs keep their root mean square.

    Both mixers read the parent's inputs, so that a layer answers for itself alone. Where the
    channels that went were zero, the child's outputs are the parent's.
    """
    fitted = [choice for choice in choices if choice.axis.norm]
    if not fitted:
        return
    sums: dict[int, list[tuple[Sums, Sums]]] = {choice.layer: [] for choice in fitted}
    readers = {choice.layer: choice.axis.reader.partition(".")[2] for choice in fitted}
    device = parent.embedding.weight.device
    for part in pieces(ids):
        x, residual = parent.embed(part.to(device)), None
        shared: Shared = {}
        for layer, block in enumerate(parent.layers):
            if layer in readers:
                normed = block.norm_mixer.after(x, residual)[0]
                smaller = child.layers[layer].mixer
                with watched(block.mixer) as large, watched(smaller) as small:
                    block.mixer(normed, dict(shared))
                    smaller(normed, dict(shared))
                name = readers[layer]
                sums[layer].append((large[name][0], small[name][0]))
            x, residual = block(x, residual, shared)
    for choice in fitted:
        axis = choice.axis
        name = f"blocks.{choice.layer}.{axis.reader}.weight"
        kept = choice.indices(f"{axis.reader}.weight", 1, parent.get_parameter(name).shape[1])
        pairs = sums[choice.layer]
        before = torch.stack([large.squares[kept.to(device)].sum() for large, _ in pairs]).sum()
        after = torch.stack([small.squares.sum() for _, small in pairs]).sum()
        norm = child.get_parameter(f"blocks.{choice.layer}.{axis.norm}")
        norm.mul_(_root(before / after))


def _root(ratio: Tensor) -> float:
    """The root of a ratio of powers; 1 where one is zero or none."""
    value = float(ratio)
    return value**0.5 if 0 < value < float("inf") else 1.0
