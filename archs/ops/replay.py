"""Values that are replayed: inputs since the value run through a mixer's scan once more.

A mixer's `Scan` takes the value on by the inputs [B, S, row] of S tokens, of which `valid` [B, S]
are a sequence's own (None: all), and answers queries: q [B, S, ...] (None: none are asked).
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.state import LayerState, Replayed
from kernels.norm.torch import OutputNorm


class Scan(Protocol):
    """A mixer's recurrence on raw inputs."""

    def __call__(
        self, rows: Tensor, valid: Tensor | None, value: Tensor, q: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The answers [B, S, H, P], and the value after the last input."""
        ...


def replay(
    at: Replayed, state: LayerState, name: str, new: Tensor, q: Tensor, scan: Scan
) -> Tensor:
    """Answers [B, K, H, P] to the queries [B, K, ...] of K new tokens with inputs [B, K, row]."""
    value, held, own = state.get(name), at.rows(), at.is_held()
    at.append(new)
    rows, valid = torch.cat((held, new), 1), state.valid
    if own is not None or valid is not None:
        own = held.new_ones(held.shape[:2], dtype=torch.bool) if own is None else own
        valid = new.new_ones(new.shape[:2], dtype=torch.bool) if valid is None else valid
        valid = torch.cat((own, valid), 1)
    asked = F.pad(q, (0, 0) * (q.dim() - 2) + (held.shape[1], 0))
    y, _ = scan(rows, valid, value, asked)
    if at.folds:
        _, value = scan(held, at.is_folded(), value)
        state.put(name, value)
    return y[:, held.shape[1] :]


def caught_up(at: Replayed | None, state: LayerState, name: str, scan: Scan) -> Tensor:
    """The value [B, ...] before a step's tokens, whatever is held taken in."""
    value = state.get(name)
    if at is not None and at.most:
        _, value = scan(at.rows(), at.is_held(), value)
    return value


def run_ring(
    at: Replayed, norm: OutputNorm, step: Callable[..., Tensor], **tokens: Tensor
) -> Tensor | None:
    """The normed answers [B, K, H·P] of a step kernel that reads the ring itself.

    step: the kernel, all but its tokens [B, K, ...] and its state known. None where the step is as
    any other but for its begin: then it runs on the value that this leaves.
    """
    from kernels.recurrent.ring import Ring

    ring = Ring(at.inputs, at.past, at.held, at.fold)
    run = partial(
        step, state=at.values, read=at.slot, write=None, ring=ring, arrivals=at.arrivals
    )  # fmt: skip
    if not at.whole:
        return run(**tokens, new=at.new, norm=norm).flatten(2)
    if at.most:
        # One token that nobody counts: the value takes in what is held, and nothing else happens.
        run(**{name: t[:, :1] for name, t in tokens.items()}, new=torch.zeros_like(at.held))
    return None
