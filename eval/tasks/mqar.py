"""Multi-query associative recall (Zoology, arXiv 2312.04927): does a mixer look things up?

n key-value pairs, then queries: wherever a key comes again, the target at that position is its
value. Keys come from the lower half of the vocabulary, values from the upper. Chance is
2 / vocab, and 1 / pairs among the values of the sequence.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from archs.checks import at_least, positive
from archs.errors import UserError
from eval.tasks.task import Task, distinct
from kernels.loss.cross_entropy import IGNORED


@dataclass(frozen=True, kw_only=True, slots=True)
class Mqar(Task):
    """pairs key-value pairs in seq_len tokens of `vocab`.

    power_a: gaps are drawn with p(k) ∝ k^(a-1); 1 is uniform, 0.01 crowds queries early.
    """

    NAME: ClassVar[str] = "mqar"

    pairs: int = 8
    power_a: float = 0.01

    def require_possible(self) -> None:
        """Raises UserError where the pairs do not fit."""
        at_least(self, 1, "pairs")
        positive(self, "power_a")
        if self.seq_len % 2 or 4 * self.pairs > self.seq_len:
            raise UserError(
                f"seq_len={self.seq_len} must be even and at least 4 x pairs={self.pairs}; change "
                "one of them"
            )
        if self.vocab // 2 - 1 < self.pairs:
            raise UserError(f"vocab={self.vocab} has too few keys for pairs={self.pairs}; raise it")

    def draw(self, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Targets are IGNORED except at queries."""
        n, half = self.pairs, self.vocab // 2
        keys = distinct(random, count, half - 1, n) + 1
        values = distinct(random, count, half, n) + half
        slots = (self.seq_len - 2 * n) // 2
        weight = np.arange(1, slots + 1, dtype=np.float64) ** (self.power_a - 1)
        places = 2 * n + 2 * distinct(random, count, slots, n, weight)
        inputs = np.zeros((count, self.seq_len), dtype=np.int64)
        targets = np.full((count, self.seq_len), IGNORED, dtype=np.int64)
        inputs[:, 0 : 2 * n : 2] = keys
        inputs[:, 1 : 2 * n : 2] = values
        np.put_along_axis(inputs, places, keys, 1)
        np.put_along_axis(targets, places, values, 1)
        return torch.from_numpy(inputs), torch.from_numpy(targets)
