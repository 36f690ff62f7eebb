"""Cross entropy of a linear head, without ever holding all logits.

N rows times V classes is the largest tensor of a small model's training step, and it is needed
only for its softmax. So rows go through in chunks: one chunk's logits become probabilities, then
their own gradient, in place, and leave as the gradients of the hidden rows and of the head. The
forward pass thus does all the work; the backward pass only scales. Softmax is in float32 at
least, products in the autocast dtype where autocast is on. Rows whose target is `IGNORED` cost
nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

#: A target that is not predicted; the value torch's own losses ignore.
IGNORED = -100
#: Logits per chunk: about a last-level cache on CPUs, enough to fill the device on GPUs.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
#: Narrower chunks waste matrix products, however large the vocabulary.
_MIN_ROWS = 64


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats of softmax(hidden weightᵀ) over the rows with a target.

    hidden: [N, D]; weight: [V, D]; targets: int64 [N], `IGNORED` where nothing is predicted.
    Returns a scalar, float32 or wider; nan when no row has a target. Differentiable once.
    Raises ValueError when the shapes do not fit.
    """
    _check(hidden, weight, targets)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets)
    return loss


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Each row's cross entropy in nats, for evaluation; no gradients.

    Shapes and errors as `linear_cross_entropy`. Returns float32 [N], 0 where ignored.
    """
    _check(hidden, weight, targets)
    kept, (hidden, targets) = _with_target(targets, hidden)
    dtype = _product_dtype(hidden)
    head = weight.to(dtype).t()
    out = torch.zeros(kept.shape[0], dtype=torch.float32, device=hidden.device)
    losses = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in _chunks(targets.shape[0], weight.shape[0], hidden.device):
            logits = (hidden[rows].to(dtype) @ head).to(_softmax_dtype(dtype))
            losses[rows] = F.cross_entropy(logits, targets[rows], reduction="none")
    out[kept] = losses
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        kept, (rows_hidden, targets) = _with_target(targets, hidden)
        dtype = _product_dtype(hidden)
        wide = _softmax_dtype(dtype)
        n, classes = targets.shape[0], weight.shape[0]
        head = weight.to(dtype)
        d_hidden = torch.empty_like(rows_hidden, dtype=wide)
        d_weight = torch.zeros_like(weight, dtype=wide)
        losses = torch.empty(n, dtype=wide, device=hidden.device)
        chunks = _chunks(n, classes, hidden.device)
        buffer = head.new_empty(chunks[0].stop if chunks else 0, classes)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in chunks:
                x, target = rows_hidden[rows].to(dtype), targets[rows, None]
                logits = torch.mm(x, head.t(), out=buffer[: x.shape[0]]).to(wide)
                picked, top = logits.gather(1, target)[:, 0], logits.amax(1)
                grad = torch.softmax(logits, 1, out=logits)
                # The largest probability is exp(top - logsumexp), and at least 1/V: its
                # logarithm is exact where that of the target's own may underflow.
                losses[rows] = top - grad.amax(1).log() - picked
                grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
                grad = grad.to(dtype)
                if dtype == wide:
                    torch.mm(grad, head, out=d_hidden[rows])
                    d_weight.addmm_(grad.t(), x)
                else:
                    d_hidden[rows] = grad @ head
                    d_weight += grad.t() @ x
        ctx.save_for_backward(kept, d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        kept, d_rows, d_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scale = d_loss / d_rows.shape[0]
        d_rows = (d_rows * scale).to(hidden_dtype)
        if d_rows.shape[0] != kept.shape[0]:
            d_rows = d_rows.new_zeros(kept.shape[0], d_rows.shape[1]).index_put_((kept,), d_rows)
        return d_rows, (d_weight * scale).to(weight_dtype), None


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and "
            "[V, D] with one D"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets {tuple(targets.shape)} must be [N], one per row of hidden "
            f"{tuple(hidden.shape)}"
        )


def _with_target(targets: Tensor, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which rows have a target, bool [N], and those rows of hidden and targets."""
    kept = targets != IGNORED
    if bool(kept.all()):
        return kept, (hidden, targets)
    return kept, (hidden[kept], targets[kept])


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(n: int, classes: int, device: torch.device) -> list[slice]:
    """Slices over n rows, the first one longest; evenly filled, so that none is a sliver."""
    most = max(_MIN_ROWS, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"]) // (4 * classes))
    count = -(-n // most)
    size = -(-n // max(count, 1))
    return [slice(i, min(i + size, n)) for i in range(0, n, max(size, 1))]
