"""Slots for the recurrent step kernels (`kernels.recurrent.step`)."""

from collections.abc import Sequence
from typing import Any

import torch


def in_place(
    slots: Sequence[int], tokens: int, counts: Sequence[int] | None = None, fresh: int | None = None
) -> dict[str, Any]:
    """Arguments of a step that reads `slots` and leaves its last states in them.

    counts: valid tokens of each sequence. fresh: the first of as many slots as there are tokens,
    which take the states before the last ones (None: they are not kept).
    """
    write = torch.full((len(slots), tokens), -1, dtype=torch.int32)
    if fresh is not None:
        write = torch.arange(fresh, fresh + write.numel(), dtype=torch.int32).view_as(write)
    for row, slot in enumerate(slots):
        count = tokens if counts is None else counts[row]
        if count:
            write[row, count - 1] = slot
    read = torch.tensor(slots, dtype=torch.int32)
    return {"read": read, "write": write, "each": fresh is not None}
