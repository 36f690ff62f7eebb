"""What a point decides, and on which data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.measure.suite import Suite
from eval.results.schema import load_long
from eval.results.statistics import Estimate
from eval.tasks.score import accuracy
from tests.eval.micro import run

pytestmark = pytest.mark.usefixtures("stub_roofline")


def test_a_task_chooses_its_rate_on_development_sequences(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second rate is the better one there and the worse one in the test."""
    scored: list[tuple[str, int]] = []
    dev = iter([0.0, 0.0, 0.2, 0.0, 0.0, 0.4])

    def answer(*_: object, split: str, sequences: int, **__: Any) -> Estimate:
        scored.append((split, sequences))
        value = next(dev) if split == "dev" else 0.1
        return Estimate(value, value, value, sequences)

    options = {"learning_rates": [1e-3, 2e-3], "steps": 2, "test_sequences": 256}
    monkeypatch.setattr("eval.measure.task.accuracy", answer)
    asked = replace(suite, train=None, decode=(), tasks={"mqar": suite.tasks["mqar"] | options})
    assert run(asked, tmp_path / "out")
    assert scored == [("dev", 128), ("dev", 128), ("dev", 256)] * 2 + [("test", 256)]
    long = load_long(tmp_path / "out" / "results.csv").set_index("measure")["value"]
    assert long["learning_rate"] == 2e-3
    assert long["accuracy"] == 0.1


def test_the_test_is_of_the_model_that_was_chosen(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rate wins, and the second one's model is there when the test is made."""
    seen: dict[str, list[float]] = {"dev": [], "test": []}

    def note(model: Any, *arguments: Any, split: Any, **options: Any) -> Estimate:
        seen[split].append(model.embedding.weight.sum().item())
        worth = 1.0 / len(seen["dev"])
        if split == "dev":
            return Estimate(worth / 10, 0.0, 1.0, 1)
        return accuracy(model, *arguments, split=split, **options)

    options = {"learning_rates": [1e-3, 2e-3], "steps": 1}
    monkeypatch.setattr("eval.measure.task.accuracy", note)
    asked = replace(suite, train=None, decode=(), tasks={"mqar": suite.tasks["mqar"] | options})
    assert run(asked, tmp_path / "out")
    assert seen["test"] == seen["dev"][1:2] != seen["dev"][-1:]
