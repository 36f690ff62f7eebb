"""Unstructured and 2:4 pruning: weights that matter least become zero, and stay zero in training.

Weights are compared within each output row, by magnitude or by Wanda's rule (arXiv 2306.11695).
Shapes stay, so nothing gets smaller by itself: it says what a model stands.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from archs.backbone import Block, Model
from archs.errors import MisfitError, UserError, unknown_name
from archs.layers import Projection
from archs.mixer import Shared
from archs.storage import runs
from train.observe import Sums, pieces, require_text, watched

Rule = Literal["magnitude", "wanda"]
RULES: tuple[Rule, ...] = ("magnitude", "wanda")
#: Of each four neighbours in a row two stay, as sparse tensor cores have it.
TWO_OF_FOUR = "2:4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsity:
    """rule: how weights are compared. zeros: the share of each row that becomes zero, to the
    nearest whole number of weights; None: two of each four neighbours do.
    """

    rule: Rule
    zeros: Fraction | None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise unknown_name("rule of sparsity", self.rule, RULES)
        if self.zeros is not None and not 0 < self.zeros < 1:
            raise UserError(
                f"zeros={self.zeros} must be a share between 0 and 1, both excluded, as in "
                f"0.5-{self.rule}"
            )

    @classmethod
    def named(cls, name: str) -> Self:
        """`SHARE-RULE` or `2:4-RULE`, as in 0.5-magnitude. Raises UserError on anything else."""
        share, _, rule = name.partition("-")
        try:
            zeros = None if share == TWO_OF_FOUR else Fraction(share)
        except (ValueError, ZeroDivisionError):
            raise UserError(
                f"sparsity '{name}' is not SHARE-RULE or 2:4-RULE; write 0.5-magnitude or "
                "2:4-wanda, say"
            ) from None
        return cls(rule=rule, zeros=zeros)  # type: ignore[arg-type]

    def __str__(self) -> str:
        share = TWO_OF_FOUR if self.zeros is None else f"{float(self.zeros):g}"
        return f"{share}-{self.rule}"

    def kept(self, scores: Tensor) -> Tensor:
        """Which of scores [N, K] stay: those of most worth in their row, bool [N, K].

        Raises MisfitError on 2:4 rows that are no multiple of four.
        """
        if self.zeros is None:
            if scores.shape[1] % 4:
                raise MisfitError(
                    f"a matrix {list(scores.shape)} has rows that four does not divide, so 2:4 "
                    f"does not fit; take 0.5-{self.rule}"
                )
            return _largest(scores.unflatten(1, (-1, 4)), 2).flatten(1)
        zeros = min(round(self.zeros * scores.shape[1]), scores.shape[1] - 1)
        return _largest(scores, scores.shape[1] - zeros)


def is_sparsity(name: str) -> bool:
    """Whether a name ends in a rule, and so is not one of `train.prune`'s plans."""
    return name.rpartition("-")[2] in RULES


def _largest(scores: Tensor, count: int) -> Tensor:
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


@torch.no_grad()
def sparsify(model: Model, plan: Sparsity, ids: Tensor | None = None) -> dict[str, Tensor]:
    """Zero weights of the blocks' projections, in place; returns what stays, by parameter, bool.

    Embedding, head, gates and projections that stay plain (`Projection`) are left whole.
    ids: calibration text, int64 [B, T], for Wanda: |W| times the norm of its column's inputs, which
    are those that the blocks before give as they are pruned. Raises UserError where it is missing,
    on packed weights, and on 2:4 rows that four does not divide, before anything changes.
    """
    for block in model.layers:
        for projection in _pruned(block).values():
            if not isinstance(projection.weight, nn.Parameter):
                raise UserError(
                    f"weights stored as {projection.storage} cannot be pruned; prune the model "
                    "that they were made of, then store it"
                )
            plan.kept(projection.weight[:1])
    if plan.rule == "magnitude":
        parts = [_zeroed(i, block, plan, {}) for i, block in enumerate(model.layers)]
        return {name: mask for part in parts for name, mask in part.items()}
    if ids is None:
        raise UserError(f"'{plan}' compares weights on calibration text; give some, or take "
                        "magnitude")  # fmt: skip
    require_text(model, ids)
    masks: dict[str, Tensor] = {}
    device = model.embedding.weight.device
    streams: list[tuple[Tensor, Tensor | None, Shared]]
    streams = [(model.embed(part.to(device)), None, {}) for part in pieces(ids)]
    for layer, block in enumerate(model.layers):
        with watched(block) as seen:
            for x, residual, shared in streams:
                block(x, residual, dict(shared))
        masks |= _zeroed(layer, block, plan, seen)
        streams = [(*block(x, residual, shared), shared) for x, residual, shared in streams]
    return masks


def _pruned(block: Block) -> dict[str, Projection]:
    found = {n: m for n, m in block.named_modules() if isinstance(m, Projection) and not m.plain}
    return {n: m for n, m in found.items() if not all(gates for gates, _ in runs(m))}


def _zeroed(
    layer: int, block: Block, plan: Sparsity, seen: Mapping[str, tuple[Sums, Sums]]
) -> dict[str, Tensor]:
    masks = {}
    for name, projection in _pruned(block).items():
        weight = projection.weight
        scores = weight.abs().double()
        if plan.rule == "wanda":
            scores = scores * seen[name][0].squares.sqrt()
        mask = plan.kept(scores)
        at = 0
        for gates, size in runs(projection):
            if gates:
                mask[at : at + size] = True
            at += size
        weight.masked_fill_(~mask, 0.0)
        masks[f"blocks.{layer}.{name}.weight"] = mask
    return masks


@contextmanager
def kept_zero(model: Model, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, weights that are not in masks [N, K] get no gradient and are zero after each step.

    For any of torch's optimizers and `train.optim`; around `train.loop.train`, say. Raises
    UserError on masks of another model.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise UserError(
                f"mask {name} {list(mask.shape)} fits no parameter of the model; take the masks "
                "that sparsify gave for it"
            )
    gone = [(parameters[name], ~mask.to(parameters[name].device)) for name, mask in masks.items()]

    def clear(*_: object) -> None:
        with torch.no_grad():
            for parameter, zero in gone:
                parameter.masked_fill_(zero, 0.0)

    clear()
    handles = [
        parameter.register_hook(lambda grad, zero=zero: grad.masked_fill(zero, 0.0))
        for parameter, zero in gone
    ]
    # Updates that mix a matrix' entries (Muon) reach the zeros, too.
    handles.append(register_optimizer_step_post_hook(clear))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
