"""State that no model made, for timing steps at a context without computing it first."""

import torch
from torch import Tensor

from infer.view import StepView


def synthesise(step: StepView) -> None:
    """Write the new rows and the fixed tensors of an open step's sequences, and nothing else.

    Every row is touched: memory that nobody wrote to may be one page of zeros, read from cache.
    """
    step.copy_shared()
    step.wrote_fixed = True
    store = step.store
    runs = {key: consecutive(table.targets()) for key, table in step.tables.items()}
    layers = zip(store.specs, store.pools, store.slots, store.history, strict=True)
    for spec, pools, fixed, history in layers:
        for pool in pools.values():
            for first, end in runs[spec.window, spec.sinks]:
                _fill(pool[..., first:end, :])
        for tensor in (*fixed.values(), *history.values()):
            for slot in step.slots:
                _fill(tensor[slot])


def _fill(tensor: Tensor) -> None:
    tensor.fill_(0.01 if tensor.dtype.is_floating_point else 1)


def consecutive(rows: Tensor) -> list[tuple[int, int]]:
    """Row numbers (int64 [n]) as runs of consecutive ones, each [first, end)."""
    if not rows.numel():
        return []
    breaks = (rows.diff() != 1).nonzero().flatten() + 1
    starts = torch.cat((rows[:1], rows[breaks])).tolist()
    ends = torch.cat((rows[breaks - 1], rows[-1:])).tolist()
    return [(first, last + 1) for first, last in zip(starts, ends, strict=True)]
