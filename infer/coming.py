"""The tokens that a step chose: on the device at once, on the host when they are read."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from infer.sequence import Answer


class Coming:
    """Tokens that answers get of a step, which may be under way.

    answers: whose they are. tokens: on the device, int64 [answers]. began: an event in the stream
    before the step's work, on CUDA; None where nobody asks how long that took.
    """

    def __init__(
        self, answers: Sequence[Answer], tokens: Tensor, began: torch.cuda.Event | None = None
    ) -> None:
        self.answers = list(answers)
        self.tokens = tokens
        self._host = tokens
        self._began = began
        self._ended: torch.cuda.Event | None = None
        if tokens.is_cuda:
            # A step launched later stands in the stream behind this copy and its event. To read
            # `tokens` themselves then would be to wait for that step as well.
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._ended = mark(tokens.device)

    @cached_property
    def places(self) -> dict[Answer, int]:
        """Where each answer's token lies."""
        return {answer: at for at, answer in enumerate(self.answers)}

    def read(self) -> list[int]:
        """The tokens; waits for this step and for none after it."""
        if self._ended is not None:
            self._ended.synchronize()
        found: list[int] = self._host.tolist()
        return found

    @property
    def device_s(self) -> float:
        """Seconds of the device from `began` to the end of a step that was read."""
        if self._began is None or self._ended is None:
            return 0.0
        return float(self._began.elapsed_time(self._ended)) / 1e3


def mark(device: torch.device) -> torch.cuda.Event:
    """An event behind all that was issued to a CUDA device so far, with its time."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
