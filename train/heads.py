"""Losses beside the next token's: a head for the token after it, an early exit, mixers' own.

The first two serve as drafts of the model itself. The head (`archs.heads`) is attached while a run
trains and lies in its checkpoint; an early exit adds no weights, but makes the first layers predict
through the final norm and head (LayerSkip, arXiv 2404.16710, with one exit and a fixed weight).
A mixer's own loss trains what the next token's cannot reach, such as a choice of rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from archs.backbone import Model, initialise, require_exit
from archs.heads import HEAD, HeadModel, MultiTokenHead
from archs.mixer import Shared, asking_losses, leave_loss, losses_left
from archs.ops.matrix import dense
from archs.registry import ModelSpec
from kernels.loss.cross_entropy import IGNORED, linear_cross_entropy
from train.recipe import Recipe

#: Weight of mixers' own losses. No other loss reaches their parameters and optimizers divide by the
#: size of gradients, so it does not say how fast these learn: it keeps their gradients out of the
#: norm by which the gradients of all parameters are clipped.
OWN_WEIGHT = 0.01


class Losses(NamedTuple):
    """Mean losses in nats: of the next token, which is what a run reports, and what is trained with
    it: the weighted sums of all others, and of those that mixers train parts of theirs by.
    """

    next_token: Tensor
    others: Tensor | None = None
    own: Tensor | None = None

    @property
    def beside(self) -> Tensor | None:
        """All that is trained beside the next token's loss; None where nothing is."""
        return sum_of([loss for loss in (self.others, self.own) if loss is not None])


LossFunction = Callable[[Model, Tensor, Tensor], Losses]


def loss_of(recipe: Recipe) -> LossFunction:
    """The losses that a recipe trains, over the targets that are not -100. Both int64 [B, T]."""
    exit_at, weights = recipe.early_exit_layers, (recipe.mtp_weight, recipe.early_exit_weight)

    def losses(model: Model, inputs: Tensor, targets: Tensor) -> Losses:
        depths = [len(model.layers), *([exit_at] if exit_at else [])]
        shared = asking_losses()
        hidden, *early = model.hidden_after(depths, inputs, shared=shared)
        others = []
        if weights[0]:
            others.append(weights[0] * _second_token(model, hidden, inputs, targets, shared))
        for states in early:
            others.append(weights[1] * _loss(model, states, targets))
        own = weighted_own(shared)
        return Losses(_loss(model, hidden, targets), sum_of(others), own)

    return losses


def weighted_own(shared: Shared) -> Tensor | None:
    """The weighted sum of the losses that mixers left; None where they left none."""
    total = sum_of(losses_left(shared))
    return None if total is None else OWN_WEIGHT * total


def sum_of(losses: Sequence[Tensor]) -> Tensor | None:
    """The sum of losses; None of none."""
    return torch.stack(list(losses)).sum() if losses else None


def _loss(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    head = dense(model.head_weight)
    return linear_cross_entropy(hidden.flatten(0, 1), head, targets.flatten())


def _second_token(
    model: Model, hidden: Tensor, inputs: Tensor, targets: Tensor, shared: Shared
) -> Tensor:
    """The attached head's loss: it reads each next token, and predicts the one after it.

    As in the paper (equation 24) its sum is divided by the number of all targets, so that parts of
    a batch that are weighted by theirs add up to the whole. Its mixer's own loss goes to `shared`.
    """
    head = HeadModel(model, attached_head(model))
    # The last position has no next token: one stands in, and nothing is predicted from it.
    following = torch.cat((inputs[:, 1:], inputs[:, -1:]), 1)
    after = torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], IGNORED)), 1)
    seen, all_seen = (int((t != IGNORED).sum()) for t in (after, targets))
    if not seen:
        return hidden.new_zeros(())
    own = asking_losses()
    states = head.hidden_states(following, hidden, own)
    for loss in losses_left(own):
        leave_loss(shared, loss)
    return _loss(head, states, after) * (seen / all_seen)


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
