"""Threads wait briefly where others have the cores, and as ever where nobody does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.measure.waiting import SPINS, wait_briefly_beside_others
from eval.predict.neighbours import Neighbours

HOME = Path(__file__).parents[2]


@pytest.mark.parametrize("theirs", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_beside_others_threads_of_the_command_wait_briefly(theirs: dict[str, str]) -> None:
    """By what OpenMP itself says as torch loads it."""
    busy = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(busy) for _ in os.sched_getaffinity(0)]
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "eval.cli", "archs"], cwd=HOME, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env={**os.environ, **theirs, "OMP_DISPLAY_ENV": "VERBOSE"},
            text=True,
        ) as command:  # fmt: skip
            assert command.stderr is not None
            said = next((line for line in command.stderr if "GOMP_SPINCOUNT" in line), "")
            # What it loads afterwards takes several times longer.
            command.kill()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert f"GOMP_SPINCOUNT = '{SPINS['GOMP_SPINCOUNT']}'" in said


@pytest.mark.parametrize(("share", "said"), [(0.0, {}), (0.09, {}), (None, {}), (0.5, SPINS)])
def test_a_quiet_machine_changes_nothing(
    share: float | None, said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Neighbours, "__exit__", lambda self, *_: setattr(self, "share", share))
    environment: dict[str, str] = {}
    wait_briefly_beside_others(environment)
    assert environment == said
