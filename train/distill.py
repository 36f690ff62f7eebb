"""Logit distillation: a model learns what its parent would say of every next token.

The loss is Hinton's (arXiv 1503.02531): KL(parent || student) of softmaxes at a temperature T,
times T² so that its gradients keep their size, mixed with the cross-entropy of the text. Logits
exist for a chunk of tokens at a time, in the backward pass, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from archs.backbone import Model
from archs.checks import positive
from archs.errors import UserError
from archs.mixer import asking_losses
from archs.ops.matrix import dense
from archs.registry import ModelSpec
from kernels.loss.cross_entropy import IGNORED
from train.heads import Losses, LossFunction, weighted_own
from train.loop import StepReport, TrainResult, train
from train.recipe import Recipe
from train.tokens import Batches, TokenSet

#: Bytes of one model's logits, in float32, that a chunk of tokens may have.
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """temperature: T of both softmaxes. weight: of the parent's word; the rest is the text's."""

    temperature: float = 1.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        positive(self, "temperature", "weight")
        if self.weight > 1:
            raise UserError(
                f"weight={self.weight} must be at most 1, which leaves the text out; change it"
            )


def distillation(parent: Model, how: Distillation) -> LossFunction:
    """A loss for `train.loop.train`: (1 - weight) · CE + weight · T² · KL, over the targets that
    are not -100.

    What a run reports as its loss is CE, as without a parent; its gradient counts by its share.
    The parent is frozen. Raises UserError on the first batch if vocabularies differ.
    """
    parent.eval()

    def losses(model: Model, inputs: Tensor, targets: Tensor) -> Losses:
        require_same_vocabulary(parent, model)
        with torch.inference_mode():
            known = parent.hidden_states(inputs)
        seen = targets != IGNORED
        shared = asking_losses()
        cross, divergence = distillation_losses(
            model.hidden_states(inputs, shared=shared)[seen], dense(model.head_weight),
            known.clone()[seen], dense(parent.head_weight).detach(),
            targets[seen], how.temperature,
        )  # fmt: skip
        told = how.weight * cross.detach() + (1 - how.weight) * cross
        others = how.weight * how.temperature**2 * divergence
        return Losses(told, others, weighted_own(shared))

    return losses


def distillation_losses(
    hidden: Tensor, head: Tensor, known: Tensor, parent_head: Tensor, targets: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean cross-entropy, and mean KL(parent || student) at a temperature, in nats.

    hidden: [N, D]; head: [V, D]; known: [N, D'] and parent_head: [V, D'], the parent's; targets:
    int64 [N]. nan where N is 0.
    """
    size = max(1, CHUNK_BYTES // (4 * len(head)))
    sums = hidden.new_zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for rows in (slice(at, at + size) for at in range(0, len(targets), size)):
        sums = sums + checkpoint(
            _chunk, hidden[rows], head, known[rows], parent_head, targets[rows], temperature,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    cross, divergence = sums / len(targets)
    return cross, divergence


def _chunk(
    hidden: Tensor, head: Tensor, known: Tensor, parent_head: Tensor, targets: Tensor, t: float
) -> Tensor:
    """Sums over rows of both losses: [2]."""
    logits, wanted = _wide(F.linear(hidden, head)), _wide(F.linear(known, parent_head))
    cross = F.cross_entropy(logits, targets, reduction="sum")
    divergence = F.kl_div(
        F.log_softmax(logits / t, -1), F.log_softmax(wanted / t, -1),
        reduction="sum", log_target=True,
    )  # fmt: skip
    return torch.stack((cross, divergence))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def require_same_vocabulary(parent: Model, student: Model) -> None:
    """Raise UserError unless both predict the same tokens."""
    if parent.vocab_size != student.vocab_size:
        raise UserError(
            f"the parent predicts {parent.vocab_size} tokens and the student "
            f"{student.vocab_size}; logits can be distilled over one vocabulary alone"
        )


def distil(
    model: Model, tokens: TokenSet, recipe: Recipe, folder: Path, *, spec: ModelSpec, steps: int,
    rate: float, parent: Model | None, seed: int, how: Distillation | None = None,
    progress: Callable[[StepReport], None] | None = None, deadline: float | None = None,
) -> TrainResult:  # fmt: skip
    """Train a pruned model of a recipe on, in place, for `steps` at `rate` times its learning rate.

    parent: the model to learn from; None: the same tokens without one, the control. seed: of the
    order of the text. Raises UserError as `require_same_vocabulary` and `train`.
    """
    if parent is not None:
        require_same_vocabulary(parent, model)
    own = recipe.continued(steps=steps, rate=rate, seed=seed)
    text = Batches(tokens, batch=own.batch, seq_len=own.seq_len, seed=seed)
    loss = None if parent is None else distillation(parent, how or Distillation())
    return train(
        model, text, own, folder, spec=spec, data_fingerprint=tokens.name, progress=progress,
        deadline=deadline, loss_fn=loss,
    )  # fmt: skip
