"""The plugin's fixture in a suite of somebody else's."""

import json
import os
import subprocess
import sys
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

def test_few_bits(decode_bench):
    found = decode_bench(
        arch="gdn:gqa=3:1", scale="tiny", rounds=2, context=40,
        weights="int8", state="kv:int8,memory:int8-ef",
    )
    assert found["weight_format"] == "int8"
    assert found["state_format"] == "kv:int8,memory:int8-ef"

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
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*Unknown arch 'gqq'. Did you mean 'gqa'?*"])
    records = json.loads(Path(pytester.path / "found.json").read_text())["benchmarks"]
    assert [r["params"] for r in records[:2]] == [{"arch": "gqa"}, {"arch": "linear"}]
    for record in records[:2]:
        info, median_s = record["extra_info"], record["stats"]["median"]
        spec = ModelSpec(arch=info["arch"], scale=get_scale("tiny")).outline()
        assert info["kernel_backend"] == "torch" and record["stats"]["rounds"] == 3
        assert info["tpot_p50_ms"] == pytest.approx(1e3 * median_s)
        assert info["output_tok_per_s"] == pytest.approx(2 / record["stats"]["mean"])
        # Of one sequence, which has room for the steps that follow.
        at_least, at_most = (spec.state_bytes(context) for context in (40, 64))
        assert at_least <= info["held_bytes"] <= at_most < info["step_bytes"]


HERE = """
import sys

from eval.metrics import answer
import train

def test_ours_is_ours(decode_bench):
    assert answer() == 42 and train.STEPS == 7
    decode_bench(arch="gqa", context=16, scale="tiny", rounds=2)
    ours = [m for m in sys.modules if m.partition(".")[0] in ("archs", "kernels", "infer", "torch")]
    assert not ours
"""


def test_a_project_with_packages_of_the_same_names_keeps_them(tmp_path: Path) -> None:
    """The modules of everyday names that its tests import are its own, and ours are not loaded."""
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("")
    (tmp_path / "eval" / "metrics.py").write_text("def answer():\n    return 42\n")
    (tmp_path / "train.py").write_text("STEPS = 7\n")
    (tmp_path / "test_mine.py").write_text(HERE)
    # As installed: the project's folder is found first, ours after it.
    path = os.pathsep.join((str(tmp_path), str(root)))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    words = [sys.executable, "-m", "pytest", "-q", "-p", "decodebench_pytest", "-p",
             "no:cacheprovider", "test_mine.py"]  # fmt: skip
    done = subprocess.run(
        words, cwd=tmp_path, env={**env, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                                  "PYTEST_PLUGINS": "pytest_benchmark.plugin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_process_that_dies_fails_its_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import os, signal

        def test_dies(decode_bench, decode_bench_worker):
            decode_bench(arch="gqa", context=16, scale="tiny", rounds=2)
            os.kill(decode_bench_worker._process.pid, signal.SIGSTOP)
            os.kill(decode_bench_worker._process.pid, signal.SIGKILL)
            decode_bench_worker._process.wait()

        def test_the_next_is_timed(decode_bench):
            assert decode_bench(arch="gqa", context=16, scale="tiny", rounds=2)["tpot_ms"] > 0
    """)
    pytester.runpytest_inprocess("-p", "no:xdist").assert_outcomes(passed=2)
