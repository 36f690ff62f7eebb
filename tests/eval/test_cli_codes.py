"""How a command ends: 1 where a failure was found, 3 where the same command should run again."""

import math
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from archs.gqa import Attention
from tests.eval.conftest import Command
from tests.eval.micro import TRAIN, rows_of, write_corpus


def test_a_failing_check_fails_the_command(
    decodebench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attention, "extend", lambda self, x, state: x)
    assert decodebench("check", "gqa").code == 1


def test_diverged_training_fails_the_command(decodebench: Command, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    argv = (
        "train",
        "--arch",
        "gqa",
        *TRAIN,
        "--learning-rate",
        "1e30",
        "--corpus",
        "path:text.txt",
    )
    outcome = decodebench(*argv, "--json")
    assert outcome.code == 1
    assert rows_of(outcome.out)[0]["status"] == "nan"


def test_a_mixer_whose_extend_is_wrong_fails_bench(
    decodebench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attention, "extend", lambda self, x, state: x)
    argv = ("--arch", "gqa", "--scale", "tiny", "--context", "16", "--steps", "2")
    timed = decodebench("bench", *argv, "--json")
    assert (timed.code, rows_of(timed.out)[0]["status"]) == (1, "incorrect")
    assert decodebench("bench", *argv).code == 1


def test_a_score_that_is_not_finite_fails_the_command(decodebench: Command, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    text = ("--corpus", "path:text.txt")
    assert decodebench("train", "--arch", "gqa", *TRAIN, *text).code == 0
    checkpoint = tmp_path / "runs" / "train" / "checkpoint.safetensors"
    with safe_open(checkpoint, "pt") as held:
        metadata, tensors = held.metadata(), {k: held.get_tensor(k) for k in held.keys()}  # noqa: SIM118
    weights = {k: v * math.nan if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(weights, checkpoint, metadata)
    scored = decodebench("quality", "runs/train", *text, "--json")
    assert (scored.code, rows_of(scored.out)[0]["value"]) == (1, None)


def test_training_that_a_budget_stops_says_run_again(decodebench: Command, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    argv = ("train", "--arch", "gqa", *TRAIN, "--corpus", "path:text.txt", "--json")
    stopped = decodebench(*argv, "--time-budget", "0.000001")
    assert (stopped.code, rows_of(stopped.out)[0]["status"]) == (3, "stopped")
    assert decodebench(*argv).code == 0
