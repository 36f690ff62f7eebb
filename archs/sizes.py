"""Scales: the shapes at which architectures are compared, and the equal-parameter rule.

Trained scales (nano to base) carry real losses; deployment scales (70m to 8b) carry random
weights and real latencies. Every architecture gets the MLP width that brings its non-embedding
parameters to those of `mha` at the same scale. Any of them may have experts in place of its MLPs
(`archs/experts.py`), as its name then says: `8b+64x8`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

from archs.checks import at_least, positive
from archs.errors import UserError, unknown_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """`active` of `count` experts take each token."""

    count: int
    active: int

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.count:
            raise UserError(
                f"{self.count}x{self.active}: each token takes {self.active} of {self.count} "
                "experts; name 1 or more, and no more than there are"
            )

    @classmethod
    def named(cls, name: str) -> Self:
        """From its name, such as 64x8: 64 experts, of which a token takes 8. Raises UserError."""
        parts = name.split("x")
        if len(parts) != 2 or not all(part.isdecimal() for part in parts):
            raise UserError(
                f"'{name}' names no experts; write how many there are and how many take a token, "
                "as in 64x8"
            )
        return cls(count=int(parts[0]), active=int(parts[1]))

    def width(self, hidden: int) -> int:
        """Hidden units of each expert, of which all active ones have `hidden` together."""
        return max(1, round(hidden / self.active))

    def read(self, tokens: int) -> float:
        """How many experts so many tokens pick on average, each picking evenly among all."""
        return self.count * (1 - (1 - self.active / self.count) ** tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """One shape. `mlp_multiple` is the step in which MLP widths are chosen.

    name: with a plus sign before experts where there are some.
    """

    name: str
    d_model: int
    n_layers: int
    head_dim: int
    vocab_size: int
    seq_len: int
    mlp_ratio: float = 8 / 3
    mlp_multiple: int = 8
    window: int = 64

    def __post_init__(self) -> None:
        at_least(self, 1, "d_model", "n_layers", "head_dim", "vocab_size", "seq_len", "window")
        at_least(self, 1, "mlp_multiple")
        positive(self, "mlp_ratio")
        _ = self.experts
        if self.d_model % self.head_dim:
            raise UserError(
                f"d_model={self.d_model} is not divisible by head_dim={self.head_dim}; "
                "choose a head_dim that divides it"
            )

    @property
    def experts(self) -> Experts | None:
        """What stands in place of each MLP; None: nothing does."""
        _, plus, named = self.name.partition("+")
        return Experts.named(named) if plus else None

    @property
    def n_heads(self) -> int:
        """Query heads of full attention."""
        return self.d_model // self.head_dim

    @property
    def reference_mlp_hidden(self) -> int:
        """MLP width of `mha`, the reference that fixes the parameter budget."""
        return round_to(self.mlp_ratio * self.d_model, self.mlp_multiple)

    @property
    def parameter_budget(self) -> int:
        """Non-embedding parameters of `mha` at this scale: what all others must match."""
        d = self.d_model
        block = 4 * d * d + 3 * d * self.reference_mlp_hidden + 2 * d
        return self.n_layers * block + d

    def with_options(self, options: dict[str, Any]) -> "Scale":
        """This scale with some fields replaced; an unknown field raises."""
        known = {f.name for f in fields(self)}
        for key in options:
            if key not in known:
                raise unknown_name("scale option", key, known)
        return replace(self, **options)


def round_to(value: float, multiple: int) -> int:
    """The nearest positive multiple."""
    return max(multiple, round(value / multiple) * multiple)


SCALES: dict[str, Scale] = {
    s.name: s
    for s in (
        Scale(
            name="nano", d_model=32, n_layers=4, head_dim=16, vocab_size=4096, seq_len=128,
            mlp_multiple=2, window=32,
        ),
        Scale(
            name="micro", d_model=64, n_layers=4, head_dim=32, vocab_size=4096, seq_len=128,
            mlp_multiple=4, window=32,
        ),
        Scale(
            name="tiny", d_model=128, n_layers=4, head_dim=32, vocab_size=4096, seq_len=128,
            window=32,
        ),
        Scale(
            name="mini", d_model=192, n_layers=6, head_dim=32, vocab_size=4096, seq_len=128,
            window=32,
        ),
        Scale(name="small", d_model=256, n_layers=8, head_dim=32, vocab_size=8192, seq_len=256),
        Scale(
            name="base", d_model=512, n_layers=8, head_dim=64, vocab_size=16384, seq_len=512,
            mlp_multiple=16, window=128,
        ),
        Scale(
            name="70m", d_model=512, n_layers=16, head_dim=64, vocab_size=32768, seq_len=2048,
            mlp_multiple=16, window=1024,
        ),
        Scale(
            name="350m", d_model=1024, n_layers=24, head_dim=64, vocab_size=49152, seq_len=2048,
            mlp_multiple=32, window=1024,
        ),
        Scale(
            name="1b", d_model=2048, n_layers=16, head_dim=64, vocab_size=128256, seq_len=8192,
            mlp_multiple=64, window=1024,
        ),
        Scale(
            name="8b", d_model=4096, n_layers=32, head_dim=128, vocab_size=128256, seq_len=8192,
            mlp_ratio=3.5, mlp_multiple=128, window=4096,
        ),
    )
}  # fmt: skip


def get_scale(name: str) -> Scale:
    """The scale of that name, such as `8b` or, with experts, `8b+64x8`.

    Raises `UserError` with the nearest name, and on experts that cannot be.
    """
    base, *_ = name.partition("+")
    if base not in SCALES:
        raise unknown_name("scale", base, SCALES)
    return replace(SCALES[base], name=name)
