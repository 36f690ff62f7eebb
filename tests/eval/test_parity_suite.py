"""The suite `parity`, trained for real: a state that can change its sign solves it, at lengths that
were never trained, and one that cannot does not (arXiv 2411.12537).
"""

from dataclasses import replace
from pathlib import Path

import pytest

from eval.measure.suite import load_suite
from eval.results.schema import load_long
from tests.eval.micro import run

SOLVES, FAILS = ("gdn(beta_max=2)",), ("gdn", "mamba2")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("stub_roofline")
def test_strengths_up_to_two_alone_solve_parity(tmp_path: Path) -> None:
    suite = load_suite("parity").only([*SOLVES, *FAILS])
    suite = replace(suite, tasks={"parity": suite.tasks["parity"] | {"seeds": [0]}})
    assert run(suite, tmp_path / "out")
    long = load_long(tmp_path / "out" / "results.csv")
    found = long.pivot_table("value", "arch", "measure")
    for arch in SOLVES:
        assert found.loc[arch, "accuracy"] > 0.98 and found.loc[arch, "accuracy_beyond"] > 0.95
    for arch in FAILS:
        assert found.loc[arch, "accuracy"] < 0.75 and found.loc[arch, "accuracy_beyond"] < 0.55
