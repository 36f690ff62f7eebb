"""Parity: can a state change its sign at a token, as often as it must? (arXiv 2411.12537)

Random bits; at each position the target is whether the number of ones so far, its own included, is
odd. A recurrence of finite precision whose transitions have no negative eigenvalue cannot do it at
every length (theorem 1 there). Longer sequences than the trained ones are asked past the trained
length alone, where nothing could be learnt by heart. Chance is 1/2.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from archs.checks import at_least
from archs.errors import UserError
from eval.tasks.task import Task
from kernels.loss.cross_entropy import IGNORED


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity(Task):
    """Bits in sequences of seq_len; the paper trains on lengths up to 40 and tests up to 256.

    asked_from: the first position that has a target; the answer at position 0 is its bit.
    longer: tokens of the longer sequences; 0: none are asked.
    """

    NAME: ClassVar[str] = "parity"

    vocab: int = 2
    seq_len: int = 40
    asked_from: int = 1
    longer: int = 256

    def require_possible(self) -> None:
        """Raises UserError where tokens are not bits, or nothing is asked."""
        at_least(self, 1, "asked_from")
        if self.vocab != 2:
            raise UserError(f"vocab={self.vocab}, and bits are 0 and 1; set it to 2")
        if self.asked_from >= self.seq_len:
            raise UserError(
                f"asked_from={self.asked_from} leaves nothing to ask in seq_len={self.seq_len}; "
                "lower it"
            )
        if self.longer and self.longer <= self.seq_len:
            raise UserError(
                f"longer={self.longer} must be above seq_len={self.seq_len}, or 0; change it"
            )

    def draw(self, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Targets are IGNORED before `asked_from`."""
        inputs = random.integers(2, size=(count, self.seq_len))
        targets = np.cumsum(inputs, 1) % 2
        targets[:, : self.asked_from] = IGNORED
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def beyond(self) -> "Parity | None":
        """The longer sequences, asked past the trained length."""
        if not self.longer:
            return None
        return replace(self, seq_len=self.longer, asked_from=self.seq_len, longer=0)
