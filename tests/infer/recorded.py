"""A stand-in for a captured graph."""

from collections.abc import Callable

import torch

from archs.backbone import Output


class Again:
    """Work that is recorded by keeping it: a replay calls it and writes to the same output."""

    def __init__(self, work: Callable[[], Output]) -> None:
        self._work = work
        self.output = Output(torch.empty(0), torch.empty(0))

    def replay(self) -> None:
        fresh = self._work()
        if self.output.logits.shape != fresh.logits.shape:
            self.output = Output(*map(torch.empty_like, fresh))
        for own, new in zip(self.output, fresh, strict=True):
            own.copy_(new)
