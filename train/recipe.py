"""How a model is trained: one frozen recipe, the same for every token mixer.

Steps count optimiser updates, and the schedule follows steps, never the clock, so two machines
train the same model. `batch` sequences of `seq_len` tokens make one step; `grad_accum` splits
them into parts and changes memory alone. A recipe is data: it travels in checkpoints and
suites as a plain dict.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, get_args

from archs.checks import at_least, parse, positive
from archs.errors import UserError, unknown_name

OptimizerName = Literal["adamw", "muon"]
ScheduleName = Literal["wsd", "cosine"]
AutocastName = Literal["none", "bf16"]

#: Fields that came later: left out where they are 0.
LATER = frozenset({"mtp_weight", "early_exit_layers", "early_exit_weight"})
#: Fields that say what to watch or try, not what a given run computes.
UNHASHED = frozenset({"learning_rates", "log_every", "eval_every", "checkpoint_every"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training run.

    learning_rates: the grid of a sweep; `learning_rate` is what a single run uses.
    schedule: "wsd" warms up, stays, decays linearly over the last `decay` of the steps; "cosine"
        warms up and decays over all the rest. Both end at `floor` times the peak.
    warmup: fraction of the steps, but at least 20 steps (a tenth of a shorter run); 0 for none.
    clip: largest gradient norm; 0 switches clipping off.
    mtp_weight: of the loss of a head that predicts one token more (`archs.heads`); 0: no head.
    early_exit_weight: of the next token's loss after the first `early_exit_layers`; 0: none.
    autocast: "bf16" (CUDA only) computes products in bfloat16; weights stay float32.
    log_every, eval_every, checkpoint_every: in steps; 0 means only at the end.
    """

    steps: int
    batch: int
    seq_len: int
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 4e-3
    learning_rates: tuple[float, ...] = ()
    schedule: ScheduleName = "wsd"
    warmup: float = 0.05
    decay: float = 0.5
    floor: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    grad_accum: int = 1
    autocast: AutocastName = "none"
    mtp_weight: float = 0.0
    early_exit_layers: int = 0
    early_exit_weight: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch", "seq_len", "grad_accum")
        at_least(self, 0, "log_every", "eval_every", "checkpoint_every", "seed")
        at_least(self, 0, "weight_decay", "clip")
        at_least(self, 0, "mtp_weight", "early_exit_layers", "early_exit_weight")
        positive(self, "learning_rate", "learning_rates", "eps")
        for name in ("warmup", "decay", "floor"):
            value = getattr(self, name)
            _require(name, value, "a fraction between 0 and 1", 0 <= value <= 1)
        _require(
            "betas",
            self.betas,
            "two numbers from 0 to below 1",
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
        )
        _require_choice("optimizer", self.optimizer, OptimizerName)
        _require_choice("schedule", self.schedule, ScheduleName)
        _require_choice("autocast", self.autocast, AutocastName)
        if self.batch % self.grad_accum:
            raise UserError(
                f"batch={self.batch} is not divisible by grad_accum={self.grad_accum}; choose a "
                "grad_accum that divides it"
            )
        if bool(self.early_exit_layers) != bool(self.early_exit_weight):
            raise UserError(
                f"early_exit_layers={self.early_exit_layers} and early_exit_weight="
                f"{self.early_exit_weight} belong together; give both, or neither"
            )
        if self.mtp_weight and self.seq_len < 2:
            raise UserError(
                f"mtp_weight={self.mtp_weight} with seq_len={self.seq_len}: there is no second "
                "token to predict; take a seq_len of 2 or more"
            )
        if self.warmup_steps + self.decay_steps > self.steps:
            raise UserError(
                f"warmup={self.warmup} and decay={self.decay} take {self.warmup_steps} + "
                f"{self.decay_steps} of {self.steps} steps; make one of them smaller"
            )

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        if self.warmup == 0:
            return 0
        return max(round(self.warmup * self.steps), min(20, self.steps // 10))

    @property
    def decay_steps(self) -> int:
        """Steps of decay at the end."""
        if self.schedule == "cosine":
            return self.steps - self.warmup_steps
        return round(self.decay * self.steps)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.batch * self.seq_len

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of update `step` (0-based); the last one gets `floor` of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = min(1.0, (self.steps - 1 - step) / self.decay_steps) if self.decay_steps else 1.0
        if self.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return self.learning_rate * (self.floor + (1 - self.floor) * left)

    def continued(self, *, steps: int, rate: float, seed: int) -> "Recipe":
        """How a trained model goes on: at `rate` times its learning rate, on the next token alone.

        seed: of the order of the text.
        """
        return replace(
            self, steps=steps, learning_rate=rate * self.learning_rate, learning_rates=(),
            mtp_weight=0.0, early_exit_layers=0, early_exit_weight=0.0, checkpoint_every=0,
            seed=seed,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The recipe of a plain dict. Raises UserError on unknown keys and wrong types."""
        return parse(cls, data, "the recipe")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values; `from_dict` restores it. Fields that came later are left out
        where they are 0, so that hashes of before hold.
        """
        values = {key: v for key, v in asdict(self).items() if v or key not in LATER}
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _require(name: str, value: object, rule: str, holds: bool) -> None:
    if not holds:
        raise UserError(f"{name}={value} must be {rule}; change it in the recipe")


def _require_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise unknown_name(name, value, get_args(choices))
