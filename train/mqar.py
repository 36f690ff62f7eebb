"""Multi-query associative recall (Zoology, arXiv 2312.04927): does a mixer look things up?

n key-value pairs, then queries: wherever a key comes again, the target at that position is its
value. Keys come from the lower half of the vocabulary, values from the upper. Batches are a pure
function of (spec, seed, step, split).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from archs.checks import at_least, positive
from archs.errors import UserError, unknown_name

IGNORED = -100
#: Training, choosing (when to stop, which rate) and reporting see sequences of their own.
Split = Literal["train", "test", "dev"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MqarSpec:
    """pairs key-value pairs in seq_len tokens of `vocab`.

    power_a: gaps are drawn with p(k) ∝ k^(a-1); 1 is uniform, 0.01 crowds queries early.
    """

    vocab: int = 64
    seq_len: int = 32
    pairs: int = 8
    power_a: float = 0.01

    def __post_init__(self) -> None:
        at_least(self, 1, "pairs", "seq_len", "vocab")
        if self.seq_len % 2 or 4 * self.pairs > self.seq_len:
            raise UserError(
                f"seq_len={self.seq_len} must be even and at least 4 x pairs={self.pairs}; change "
                "one of them"
            )
        if self.vocab // 2 - 1 < self.pairs:
            raise UserError(f"vocab={self.vocab} has too few keys for pairs={self.pairs}; raise it")
        positive(self, "power_a")


def mqar_batch(
    spec: MqarSpec, batch: int, *, seed: int, step: int, split: Split = "train"
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [batch, seq_len]; targets IGNORED except at queries."""
    if split not in get_args(Split):
        raise unknown_name("split", split, get_args(Split))
    random = np.random.default_rng((seed, step, get_args(Split).index(split)))
    n, half = spec.pairs, spec.vocab // 2
    keys = _distinct(random, batch, half - 1, n, None) + 1
    values = _distinct(random, batch, half, n, None) + half
    slots = (spec.seq_len - 2 * n) // 2
    weight = np.arange(1, slots + 1, dtype=np.float64) ** (spec.power_a - 1)
    places = 2 * n + 2 * _distinct(random, batch, slots, n, weight)
    inputs = np.zeros((batch, spec.seq_len), dtype=np.int64)
    targets = np.full((batch, spec.seq_len), IGNORED, dtype=np.int64)
    inputs[:, 0 : 2 * n : 2] = keys
    inputs[:, 1 : 2 * n : 2] = values
    np.put_along_axis(inputs, places, keys, 1)
    np.put_along_axis(targets, places, values, 1)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _distinct(
    random: np.random.Generator, batch: int, population: int, n: int, weight: np.ndarray | None
) -> np.ndarray:
    """n distinct draws from 0..population-1 per row (Gumbel top-n), in random order, [batch, n]."""
    score = random.gumbel(size=(batch, population))
    if weight is not None:
        score = score + np.log(weight)
    return np.argsort(-score, axis=1)[:, :n]


@dataclass(frozen=True, slots=True)
class MqarBatches:
    """The training stream of one MQAR task."""

    spec: MqarSpec
    batch: int
    seed: int

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step."""
        return mqar_batch(self.spec, self.batch, seed=self.seed, step=step)
