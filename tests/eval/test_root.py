"""`import decodebench`: lazy, and beside whatever a user's own modules are called."""

import subprocess
import sys
from pathlib import Path

import pytest

import decodebench
from eval.cli import api
from eval.report import plot

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A script in `cwd`, where decodebench is installed: it is found after the script's folder."""
    (cwd / "script.py").write_text(f"import sys\nsys.path.append({str(ROOT)!r})\n{code}\n")
    words = [sys.executable, "script.py"]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)


def test_names_are_those_of_the_api_and_the_pictures() -> None:
    assert decodebench.plot is plot
    assert dir(decodebench) == sorted([*api.__all__, "plot"])
    for name in api.__all__:
        assert getattr(decodebench, name) is getattr(api, name)
    assert decodebench.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="no attribute 'benchmark'; it has bench, claims"):
        decodebench.benchmark  # noqa: B018


def test_importing_it_loads_nothing(tmp_path: Path) -> None:
    code = "import decodebench\nassert not {'torch', 'eval', 'train'} & set(sys.modules)"
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_it_works_beside_modules_of_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    code = f"""
import decodebench
rows = decodebench.predict(["gqa"], scale="tiny", hardware=["h100"], batches=[1], contexts=[64])
assert list(rows["arch"]) == ["gqa"]
assert sys.path[0] != '' and sys.path.count({str(ROOT)!r}) == 1
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_taken_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    done = python("import train\nimport decodebench\ndecodebench.predict", tmp_path)
    [last] = done.stderr.strip().splitlines()[-1:]
    assert last.startswith(f"ImportError: 'train' was imported from {tmp_path}/train.py before")
    assert last.endswith("import decodebench and use it first, or rename the other one")
