"""A law's verdict on a mixer: the figure, the first wrong place, and the likely cause."""

import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Largest allowed difference in float32, relative to the largest reference value. Never softened.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Check:
    """One verdict: the law's name, whether it held, and the figure that says so.

    passed: None if it cannot be judged, with the reason as `detail`.
    """

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Wrong:
    """The first position that is off: which case, sequence and token, and by how much."""

    case: str
    sequence: int
    token: int
    error: float

    def __str__(self) -> str:
        where = f"{self.case}: token {self.token} of sequence {self.sequence}"
        return f"{where} is off by {self.error:.1e}"


class StateFault(Exception):
    """A mixer uses its state otherwise than it declares it; the message is the whole story."""


class Comparison:
    """Differences of one law: the largest of all, and the first place beyond the limit."""

    def __init__(self, limit: float = TOLERANCE) -> None:
        self.limit = limit
        self.worst = 0.0
        self.wrong: Wrong | None = None

    def see(self, got: Tensor, expected: Tensor, case: str) -> bool:
        """Compare [B, T, ...] at every position; whether this case holds."""
        if not expected.numel():
            return True
        errors = position_errors(got, expected)
        worst = float(errors.max())
        self.worst = max(self.worst, worst)
        if worst > self.limit and self.wrong is None:
            token = int((errors > self.limit).any(0).nonzero()[0])
            sequence = int(errors[:, token].argmax())
            self.wrong = Wrong(case, sequence, token, float(errors[sequence, token]))
        return worst <= self.limit

    def verdict(self, name: str, cause: Callable[[Wrong], str]) -> Check:
        """The verdict; cause says why the first wrong position is likely to be wrong."""
        if self.wrong is None:
            detail = f"largest relative error {self.worst:.1e} (limit {self.limit:.0e})"
            return Check(name, True, detail)
        detail = f"{self.wrong} (limit {self.limit:.0e}); likely cause: {cause(self.wrong)}"
        return Check(name, False, detail)


def position_errors(got: Tensor, expected: Tensor) -> Tensor:
    """float64 [B, T]: the largest difference of each position of [B, T, ...], relative to the
    largest reference value of all; infinite where it is not finite.
    """
    wide = expected.double()
    away = (got.double() - wide).abs().flatten(2).amax(-1)
    relative = away / wide.abs().max().clamp(min=1e-12)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)


def error_of(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest reference value; infinite for NaN."""
    difference = (got.double() - expected.double()).abs().max()
    relative = difference / expected.double().abs().max().clamp(min=1e-12)
    return float(relative) if torch.isfinite(relative) else float("inf")


def explain(error: Exception, files: Iterable[str]) -> str:
    """One line: where in one of `files` an exception came from, and what it says."""
    known = set(files)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename in known]
    text = str(error).strip().split("\n")[0]
    if isinstance(error, StateFault):
        what = text
    else:
        what = f"{type(error).__name__}: {text}"
        own = own or list(frames[-1:])
    if not own:
        return what
    return f"{place_of(own[-1].filename, own[-1].lineno)} in {own[-1].name}: {what}"


def place_of(file: str, line: int | None) -> str:
    """A line of a file, as short as the working directory allows."""
    near = os.path.relpath(file)
    return f"{file if near.startswith('..') else near}:{line}"


def short(dtype: torch.dtype) -> str:
    """float32, bfloat16, …"""
    return str(dtype).removeprefix("torch.")
