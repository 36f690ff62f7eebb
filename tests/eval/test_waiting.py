"""Threads that wait sleep soon: what OpenMP itself says that it was told, in every entry."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import decodebench_pytest
from eval.measure import child, waiting

HOME = Path(__file__).parents[2]


def spins(words: list[str], environment: dict[str, str], given: str = "") -> set[str]:
    """The turns that OpenMP says, as torch loads it, its threads will wait awake."""
    done = subprocess.run(
        words, env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"}, input=given, check=True,
        capture_output=True, text=True, cwd=HOME,
    )  # fmt: skip
    said = (line.strip().partition(" = ") for line in done.stderr.splitlines())
    return {value.strip("'") for name, _, value in said if name == "GOMP_SPINCOUNT"}


@pytest.mark.parametrize("theirs", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_of_the_command_wait_briefly(theirs: dict[str, str]) -> None:
    words = [sys.executable, "-m", "eval.cli", "archs"]
    assert spins(words, {**os.environ, **theirs}) == set(waiting.SPINS.values())


def test_threads_of_our_processes_wait_briefly() -> None:
    words = [sys.executable, "-c", "import torch"]
    assert spins(words, child.environment()) == set(waiting.SPINS.values())


def test_the_plugin_says_the_same_without_importing_ours() -> None:
    assert decodebench_pytest._SPINS == waiting.SPINS
