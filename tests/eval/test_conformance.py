"""The conformance kit over the whole registry, hybrids and a file from outside; and its teeth."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from archs.gqa import Attention
from archs.registry import HYBRIDS, REGISTRY
from archs.spec import LayerState
from eval.conformance import CHECKS, Subject, run_checks

OUTSIDE = Path(__file__).parents[1] / "data" / "decayed_sum.py"
SUBJECTS = [*REGISTRY, *HYBRIDS, str(OUTSIDE)]


@pytest.fixture(scope="module", params=SUBJECTS, ids=lambda s: Path(s).stem)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(subject: Subject, check: str) -> None:
    verdict = CHECKS[check](subject)
    assert verdict.passed, f"{verdict.name}: {verdict.detail}"


def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Attention.extend

    def forgetful(self: Attention, x: Tensor, state: LayerState) -> Tensor:
        return honest(self, x * (1.01 if x.shape[1] == 1 else 1.0), state)

    monkeypatch.setattr(Attention, "extend", forgetful)


def test_a_mixer_that_decodes_differently_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch)
    failed = {c.name for c in run_checks("gqa") if not c.passed}
    assert "split law" in failed
    assert "rollback" in failed


def test_a_mixer_that_looks_ahead_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Attention.forward

    def prescient(self: Attention, x: Tensor, shared: object = None) -> Tensor:
        return honest(self, x) + torch.roll(x, -1, 1)

    monkeypatch.setattr(Attention, "forward", prescient)
    assert not CHECKS["causality"](Subject("mha")).passed
