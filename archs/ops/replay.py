"""Values that are replayed: inputs since the value run through a mixer's recurrence once more."""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from archs.state import LayerState, Replayed
from kernels.norm.torch import OutputNorm


class Recurrence(Protocol):
    """A mixer's recurrence on raw inputs [B, T, row], of which `valid` [B, T] are a sequence's own
    (None: all), from the value before them.
    """

    def answers(self, q: Tensor, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        """What the queries [B, K, ...] of the last K tokens get, [B, K, H, P]."""
        ...

    def after(self, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        """The value after them."""
        ...


def replay(
    at: Replayed, state: LayerState, name: str, new: Tensor, q: Tensor, recurrence: Recurrence
) -> Tensor:
    """Answers [B, K, H, P] to the queries [B, K, ...] of K new tokens with inputs [B, K, row]."""
    value, held, own = state.get(name), at.rows(), at.is_held()
    at.append(new)
    valid = state.valid
    if own is not None or valid is not None:
        own = held.new_ones(held.shape[:2], dtype=torch.bool) if own is None else own
        valid = new.new_ones(new.shape[:2], dtype=torch.bool) if valid is None else valid
        valid = torch.cat((own, valid), 1)
    y = recurrence.answers(q, torch.cat((held, new), 1), valid, value)
    if at.folds:
        state.put(name, recurrence.after(held, at.is_folded(), value))
    return y


def caught_up(at: Replayed | None, state: LayerState, name: str, recurrence: Recurrence) -> Tensor:
    """The value [B, ...] before a step's tokens, whatever is held taken in."""
    value = state.get(name)
    return value if at is None or not at.most else recurrence.after(at.rows(), at.is_held(), value)


def run_ring(
    at: Replayed, norm: OutputNorm | None, step: Callable[..., Tensor], **tokens: Tensor
) -> Tensor | None:
    """The normed answers [B, K, H·P] of a step kernel that reads the ring itself.

    norm: None for a kernel that norms by itself. step: the kernel, all but its tokens [B, K, ...]
    and its state known. None where the step is as
    any other but for its begin: then it runs on the value that this leaves.
    """
    from kernels.recurrent.ring import Ring

    ring = Ring(at.inputs, at.past, at.held, at.fold)
    run = partial(step, state=at.values, read=at.slot, write=None, ring=ring)
    if not at.whole:
        normed = {} if norm is None else {"norm": norm, "arrivals": at.arrivals}
        return run(**tokens, new=at.new, **normed).flatten(2)
    if at.most:
        # One token that nobody counts: the value takes in what is held, and nothing else happens.
        run(**{name: t[:, :1] for name, t in tokens.items()}, new=torch.zeros_like(at.held))
    return None
