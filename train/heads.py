"""Losses beside the next token's: a head for the token after it, and an early exit.

Both serve as drafts of the model itself. The head (`archs.heads`) is attached while a run trains
and lies in its checkpoint; an early exit adds no weights, but makes the first layers predict
through the final norm and head (LayerSkip, arXiv 2404.16710, with one exit and a fixed weight).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from archs.backbone import Model, initialise, require_exit
from archs.heads import HEAD, HeadModel, MultiTokenHead
from archs.ops.matrix import dense
from archs.registry import ModelSpec
from kernels.loss.cross_entropy import IGNORED, linear_cross_entropy
from train.recipe import Recipe


class Losses(NamedTuple):
    """Mean losses in nats: of the next token, which is what a run reports, and the weighted sum of
    all others, which is trained with it.
    """

    next_token: Tensor
    others: Tensor | None = None


LossFunction = Callable[[Model, Tensor, Tensor], Losses]


def loss_of(recipe: Recipe) -> LossFunction:
    """The losses that a recipe trains, over the targets that are not -100. Both int64 [B, T]."""
    exit_at, weights = recipe.early_exit_layers, (recipe.mtp_weight, recipe.early_exit_weight)

    def losses(model: Model, inputs: Tensor, targets: Tensor) -> Losses:
        depths = [len(model.layers), *([exit_at] if exit_at else [])]
        hidden, *early = model.hidden_after(depths, inputs)
        others = []
        if weights[0]:
            others.append(weights[0] * _second_token(model, hidden, inputs, targets))
        for states in early:
            others.append(weights[1] * _loss(model, states, targets))
        together = torch.stack(others).sum() if others else None
        return Losses(_loss(model, hidden, targets), together)

    return losses


def _loss(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    head = dense(model.head_weight)
    return linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten())


def _second_token(model: Model, hidden: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """The attached head's loss: it reads each next token, and predicts the one after it.

    As in the paper (equation 24) its sum is divided by the number of all targets, so that parts of
    a batch that are weighted by theirs add up to the whole.
    """
    head = HeadModel(model, attached_head(model))
    # The last position has no next token: one stands in, and nothing is predicted from it.
    following = torch.cat((inputs[:, 1:], inputs[:, -1:]), 1)
    after = torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)), 1)
    seen, all_seen = (int((t != IGNORED).sum()) for t in (after, targets))
    if not seen:
        return hidden.new_zeros(())
    return _loss(head, head.hidden_states(following, hidden), after) * (seen / all_seen)


def attached_head(model: Model) -> MultiTokenHead:
    """The head that a model is trained with."""
    head = model.get_submodule(HEAD)
    assert isinstance(head, MultiTokenHead)
    return head


@contextmanager
def attached(model: Model, spec: ModelSpec, recipe: Recipe) -> Iterator[None]:
    """While a run lasts the model holds the head that its recipe trains, newly initialised.

    Raises UserError for an early exit that leaves no layer out.
    """
    if recipe.early_exit_layers:
        require_exit(recipe.early_exit_layers, len(model.layers))
    if not recipe.mtp_weight:
        yield
        return
    head = spec.head(model.embedding.weight.dtype).to_empty(device=model.embedding.weight.device)
    # A residual stream of its own, of one layer.
    initialise(head, recipe.seed, 1)
    model.add_module(HEAD, head)
    model.use(model.backend)
    try:
        yield
    finally:
        delattr(model, HEAD)
