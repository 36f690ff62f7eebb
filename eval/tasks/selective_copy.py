"""Selective copying (Mamba, arXiv 2312.00752; MAD, arXiv 2403.17844): is what is kept chosen?

A few tokens lie scattered among blanks; markers at the end ask for them in their order. What is
kept must be chosen by content, since the gaps differ, and a window sees the last ones alone.
Chance is 1 / (vocab - 2).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from archs.checks import at_least
from archs.errors import UserError
from eval.tasks.task import Task, distinct
from kernels.loss.cross_entropy import IGNORED

BLANK, MARKER = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectiveCopy(Task):
    """copied tokens out of `vocab` among blanks, then as many markers, in seq_len tokens."""

    NAME: ClassVar[str] = "selective_copy"

    vocab: int = 16
    seq_len: int = 64
    copied: int = 8

    def require_possible(self) -> None:
        """Raises UserError where what is copied does not fit."""
        at_least(self, 1, "copied")
        at_least(self, MARKER + 3, "vocab")
        if 2 * self.copied > self.seq_len:
            raise UserError(
                f"seq_len={self.seq_len} must be at least 2 x copied={self.copied}; change one of "
                "them"
            )

    def draw(self, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Targets are IGNORED except at markers."""
        first = self.seq_len - self.copied
        places = np.sort(distinct(random, count, first, self.copied), axis=1)
        tokens = random.integers(MARKER + 1, self.vocab, size=(count, self.copied))
        inputs = np.full((count, self.seq_len), BLANK, dtype=np.int64)
        targets = np.full((count, self.seq_len), IGNORED, dtype=np.int64)
        np.put_along_axis(inputs, places, tokens, 1)
        inputs[:, first:] = MARKER
        targets[:, first:] = tokens
        return torch.from_numpy(inputs), torch.from_numpy(targets)
