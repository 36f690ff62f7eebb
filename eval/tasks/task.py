"""The base of synthetic tasks: models trained from scratch, on sequences seen once.

Models are few layers without an MLP and with one short convolution for all, so that the mixer alone
decides. Batches are a pure function of (task, seed, step, split).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from torch import Tensor

from archs.checks import at_least, some
from archs.errors import unknown_name
from archs.registry import ModelSpec, pattern_of
from archs.sizes import Scale
from train.recipe import Recipe

#: Training, choosing (when to stop, which rate) and reporting see sequences of their own.
Split = Literal["train", "test", "dev"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task(ABC):
    """The options of a task.

    vocab, seq_len: of its sequences. window: of windowed mixers in this task, shorter than the gap
      that they must bridge. overrides: options of mixers, by name.
    """

    #: Its name in `eval.tasks.TASKS`.
    NAME: ClassVar[str]

    vocab: int = 64
    seq_len: int = 32
    d_model: int = 64
    n_layers: int = 2
    head_dim: int = 64
    short_conv: int = 4
    window: int = 8
    steps: int = 400
    batch: int = 64
    learning_rates: tuple[float, ...] = (0.003, 0.01)
    seeds: tuple[int, ...] = (0,)
    eval_every: int = 25
    test_sequences: int = 512
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        some(self, "learning_rates", "seeds")
        at_least(self, 1, "vocab", "seq_len", "n_layers", "test_sequences")
        at_least(self, 0, "short_conv")
        self._scale(layers=1)
        for rate in self.learning_rates:
            for seed in self.seeds:
                self.recipe(rate, seed)
        self.require_possible()

    @abstractmethod
    def require_possible(self) -> None:
        """Raises UserError where no sequence has these options."""

    @abstractmethod
    def draw(self, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [count, seq_len]; targets IGNORED where nothing is asked."""

    def beyond(self) -> "Task | None":
        """The same on longer sequences than are trained; None where those are not asked."""
        return None

    def sequences(
        self, count: int, *, seed: int, step: int, split: Split = "train"
    ) -> tuple[Tensor, Tensor]:
        """As `draw`, by seed, step and split. Raises UserError on an unknown split."""
        if split not in get_args(Split):
            raise unknown_name("split", split, get_args(Split))
        random = np.random.default_rng((seed, step, get_args(Split).index(split)))
        return self.draw(random, count)

    @property
    def asked(self) -> str:
        """Its options without the length, as words of the form name=value."""
        recipe = {f.name for f in fields(Task)} - {"vocab"}
        own = (f.name for f in fields(self) if f.name not in recipe)
        return " ".join(f"{name}={getattr(self, name)}" for name in own)

    @property
    def fingerprint(self) -> str:
        """What the training data are, seeds apart."""
        return f"{self.NAME} seq_len={self.seq_len} {self.asked}"

    def model(self, arch: str, overrides: Mapping[str, dict[str, Any]]) -> ModelSpec:
        """Few layers; of a hybrid at least one period of its pattern."""
        pattern = pattern_of(arch)
        wanted = {**overrides, **self.overrides}
        return ModelSpec(
            arch=arch, scale=self._scale(layers=sum(layers.count for layers in pattern)),
            overrides={p.mixer: wanted[p.mixer] for p in pattern if p.mixer in wanted}, hidden=0,
            short_conv=self.short_conv,
        )  # fmt: skip

    def of_one(self, seed: int) -> "Task":
        """The same with one seed alone, and without the overrides, which the model has."""
        return replace(self, seeds=(seed,), overrides={})

    def recipe(self, rate: float, seed: int) -> Recipe:
        """One run of it."""
        return Recipe(
            steps=self.steps, batch=self.batch, seq_len=self.seq_len, learning_rate=rate,
            weight_decay=0.1, eval_every=self.eval_every, checkpoint_every=0, seed=seed,
            warmup=0.1, log_every=self.eval_every,
        )  # fmt: skip

    def _scale(self, layers: int) -> Scale:
        return Scale(
            name=self.NAME, d_model=self.d_model, n_layers=max(self.n_layers, layers),
            head_dim=self.head_dim, vocab_size=self.vocab, seq_len=self.seq_len,
            window=self.window,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TaskBatches:
    """The training stream of a task."""

    task: Task
    seed: int

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one step."""
        return self.task.sequences(self.task.batch, seed=self.seed, step=step)


def distinct(
    random: np.random.Generator, rows: int, population: int, n: int,
    weight: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """n distinct draws from 0..population-1 per row (Gumbel top-n), in random order, [rows, n]."""
    score = random.gumbel(size=(rows, population))
    if weight is not None:
        score = score + np.log(weight)
    return np.argsort(-score, axis=1)[:, :n]
