"""Fake operations on a machine whose clock always says the same, in place of a GPU."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from eval.measure.progress import Progress
from eval.predict.cold import Timing
from eval.predict.machine import ProductRate, Roofline
from eval.proof.gpu import proof
from eval.proof.gpu.case import Case, Check, Op, Run
from eval.proof.gpu.proof import Proof

CPU = torch.device("cpu")
PRODUCTS = tuple(ProductRate(rows, 2e9 / rows, 3.0 + rows) for rows in (1, 2, 8, 16, 64))
RATES = Roofline(1e9, 1e12, torch.bfloat16, PRODUCTS, 1.5, 1.25e9)
#: What the stubbed timer says of everything.
SECONDS = 2e-3
#: What a worker prints of a check that passed.
OK = {"status": "ok", "error": 0.0}


class Bench:
    """Fake operations that say what ran."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.log: list[str] = []

    def run(self, label: str, value: float = 1.0) -> Run:
        def work() -> Tensor:
            self.log.append(label)
            return torch.full((2,), value)

        return work

    def case(self, name: str, order: int, **baselines: Run) -> Case:
        def build(_: torch.device) -> Mapping[str, Run]:
            return {"triton": self.run(name), **baselines}

        return Case(name=name, order=order, moved_bytes=1000, flops=4000, build=build)

    def check(self, name: str = "sound", got: float = 1.0) -> Check:
        def pairs(_: torch.device) -> Sequence[tuple[Tensor, Tensor]]:
            self.log.append(f"check {name}")
            return [(torch.ones(3), torch.ones(3)), (torch.full((3,), got), torch.ones(3))]

        return Check(name=name, run=pairs, limit=1e-3)

    def proof(self, *ops: Op, budget_s: float | None = None, **options: Any) -> Proof:
        progress = Progress(Console(quiet=True), quiet=True)
        return Proof(ops, self.out, CPU, budget_s=budget_s, progress=progress, **options)

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.out / name).open(newline="") as file:
            return list(csv.DictReader(file))

    def statuses(self) -> list[tuple[str, str, str, str]]:
        keys = ("op", "case", "backend", "status")
        return [tuple(r[k] for k in keys) for r in self.rows("kernels.csv")]  # type: ignore[misc]


def failing() -> object:
    raise ImportError("no such\nkernel")


def make_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A machine whose clock always says the same, in place of a GPU."""
    made = Bench(tmp_path / "proof")

    def time_cold(runs: Sequence[Run], device: torch.device) -> Timing:
        for run in runs:
            run()
        return Timing(SECONDS, SECONDS, SECONDS, "graph")

    def measure(device: torch.device, dtype: torch.dtype, rows: Sequence[int]) -> Roofline:
        assert tuple(rows) == tuple(p.rows for p in PRODUCTS)
        made.log.append("roofline")
        return RATES

    monkeypatch.setattr(proof, "time_cold", time_cold)
    monkeypatch.setattr(proof, "copies_for", lambda *_: 2)
    monkeypatch.setattr(proof, "resolve_backend", lambda name, device: name)
    monkeypatch.setattr(proof, "measure_roofline", measure)
    return made
