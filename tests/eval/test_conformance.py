"""The conformance kit over the whole registry, hybrids and a file from outside; and its teeth."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from archs.gqa import Attention
from archs.registry import HYBRIDS, REGISTRY
from archs.spec import LayerState
from eval.agreement import Agreement
from eval.conformance import CHECKS, Subject, run_checks

OUTSIDE = Path(__file__).parents[1] / "data" / "decayed_sum.py"
SUBJECTS = [*REGISTRY, *HYBRIDS, str(OUTSIDE)]


@pytest.fixture(scope="module", params=SUBJECTS, ids=lambda s: Path(s).stem)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


#: What a machine without a GPU can tell.
ANYWHERE = [name for name in CHECKS if name != "kernels"]


@pytest.mark.parametrize("check", ANYWHERE)
def test_conformance(subject: Subject, check: str) -> None:
    verdict = CHECKS[check](subject)
    assert verdict.passed, f"{verdict.name}: {verdict.detail}"


def test_kernels_are_not_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    verdict = CHECKS["kernels"](Subject("gqa"))
    assert verdict.passed is None and "not measured" in verdict.detail


@pytest.mark.parametrize(("error", "passed"), [(1e-2, True), (0.5, False), (float("nan"), False)])
def test_kernels_are_held_to_the_torch_form(
    monkeypatch: pytest.MonkeyPatch, error: float, passed: bool
) -> None:
    subject = Subject("gqa")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("eval.conformance.resolve_backend", lambda name, device: name)
    found = Agreement(error, 0.1)
    monkeypatch.setattr("eval.conformance.agreement", lambda *_, **__: found)
    monkeypatch.setattr(type(subject.spec), "build", lambda *_, **__: subject.model)
    assert CHECKS["kernels"](subject).passed is passed


def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Attention.extend

    def forgetful(self: Attention, x: Tensor, state: LayerState) -> Tensor:
        return honest(self, x * (1.01 if x.shape[1] == 1 else 1.0), state)

    monkeypatch.setattr(Attention, "extend", forgetful)


def test_a_mixer_that_decodes_differently_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _broken(monkeypatch)
    failed = {c.name for c in run_checks("gqa") if c.passed is False}
    assert "split law" in failed
    assert "rollback" in failed


def test_a_mixer_that_looks_ahead_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Attention.forward

    def prescient(self: Attention, x: Tensor, shared: object = None) -> Tensor:
        return honest(self, x) + torch.roll(x, -1, 1)

    monkeypatch.setattr(Attention, "forward", prescient)
    assert not CHECKS["causality"](Subject("mha")).passed
