"""The plugin's fixture in a suite of somebody else's."""

import json
from pathlib import Path

import pytest

from archs.registry import ModelSpec
from archs.sizes import get_scale

pytest_plugins = ["pytester"]

SUITE = """
import pytest

@pytest.mark.parametrize("arch", ["gqa", "linear"])
def test_decode(decode_bench, arch):
    decode_bench(arch=arch, batch=2, context=40, scale="tiny", rounds=3)

def test_unknown(decode_bench):
    decode_bench(arch="gqq", scale="tiny")
"""


def test_a_users_suite_gets_figures_by_our_names(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The suite is the user's, who does not run it side by side; pytest-benchmark looks here.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makepyfile(SUITE)
    result = pytester.runpytest_inprocess("--benchmark-json=found.json")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*Unknown arch 'gqq'. Did you mean 'gqa'?*"])
    records = json.loads(Path(pytester.path / "found.json").read_text())["benchmarks"]
    assert [r["params"] for r in records] == [{"arch": "gqa"}, {"arch": "linear"}]
    for record in records:
        info, median_s = record["extra_info"], record["stats"]["median"]
        spec = ModelSpec(arch=info["arch"], scale=get_scale("tiny")).outline()
        assert info["kernel_backend"] == "torch" and record["stats"]["rounds"] == 3
        assert info["tpot_p50_ms"] == pytest.approx(1e3 * median_s)
        assert info["output_tok_per_s"] == pytest.approx(2 / record["stats"]["mean"])
        # Of one sequence, which has room for the steps that follow.
        at_least, at_most = (spec.state_bytes(context) for context in (40, 64))
        assert at_least <= info["state_bytes"] <= at_most < info["step_bytes"]
