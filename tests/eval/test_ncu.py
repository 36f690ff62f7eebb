"""Nsight Compute: what it is asked, and how its answers are read, whatever their shape."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from eval.measure import ncu
from eval.measure.ncu import NotCountedError, command, parse
from eval.results.rows import Status
from tests.eval.fake_ncu import BYTES, CPU, CUDA, FakeNcu, make_fake_ncu

BEFORE = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name")
fake_ncu = pytest.fixture(make_fake_ncu)


def row(*cells: object) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


def tall(values: Sequence[tuple[int, str, str, str]]) -> str:
    """What ncu prints with a counter a row; values: (kernel, counter, unit, value)."""
    lines = [row(*BEFORE, "Section Name", "Metric Name", "Metric Unit", "Metric Value")]
    for kernel, name, unit, value in values:
        lines.append(row(kernel, 7, "python", "host", "f(int, float)", "x", name, unit, value))
    return "\n".join(["==PROF== Connected to process 7", *lines, "==PROF== Disconnected"])


def broad(names: Sequence[str], units: Sequence[str], *kernels: Sequence[str]) -> str:
    """What ncu prints with a kernel a row, units below the names."""
    lines = [row(*BEFORE, *names), row("", "", "", "", "", *units)]
    lines += [row(n, 7, "python", "host", "f(int)", *k) for n, k in enumerate(kernels)]
    return "\n".join(["==PROF== Connected to process 7", "said by the child", *lines])


# -- what is asked --


def test_the_command_leaves_caches_and_clocks_alone() -> None:
    words = command([BYTES, "b"], CUDA, "copy")
    options = dict(zip(words[1:16:2], words[2:17:2], strict=False))
    assert words[0] == "ncu"
    assert options["--cache-control"] == options["--clock-control"] == "none"
    assert options["--profile-from-start"] == "off"
    assert words[words.index("--metrics") + 1] == f"{BYTES},b"
    assert words[words.index("--print-units") + 1] == "base"
    assert words[-6:] == [sys.executable, "-P", "-m", "eval.measure.counted", "cuda", "copy"]


# -- how answers are read --


def test_kernels_add_up_in_both_shapes_of_the_table() -> None:
    wide_text = broad(["a", "b"], ["byte", "inst"], ("1,000", "5"), ("24", "6"))
    assert parse(wide_text, ["a", "b"]) == {"a": 1024, "b": 11}
    tall_text = tall([(0, "a", "byte", "1,000"), (0, "b", "inst", "5"), (1, "a", "byte", "24"),
                      (1, "b", "inst", "6"), (1, "other", "%", "n/a")])  # fmt: skip
    assert parse(tall_text, ["a", "b"]) == {"a": 1024, "b": 11}


@pytest.mark.parametrize(
    ("value", "unit", "number"),
    [
        ("1073741824", "byte", 1 << 30),
        ("1,073,741,824.00", "byte", 1 << 30),
        ("1.073.741.824", "byte", 1 << 30),
        ("1.073.741.824,50", "byte", (1 << 30) + 0.5),
        ("1 073 741 824", "byte", 1 << 30),
        ("1'073'741'824", "byte", 1 << 30),
        ("1,024", "byte", 1024),
        ("65,77", "Mbyte", 65.77e6),
        ("1.5", "Gbyte", 1.5e9),
        ("2.25", "Kbyte", 2250),
        ("2", "TB", 2e12),
        ("7", "", 7),
        ("0", "inst", 0),
        ("3", "op", 3),
    ],
)
def test_units_and_separators_of_any_locale(value: str, unit: str, number: float) -> None:
    assert parse(tall([(0, "a", unit, value)]), ["a"])["a"] == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        ("n/a", "", "says 'n/a'"),
        ("", "", "says 'nothing'"),
        ("nan", "byte", "says 'nan byte'"),
        ("12", "cycle", "says '12 cycle'"),
        ("12", "%", "says '12 %'"),
    ],
)
def test_a_counter_without_a_figure_is_not_zero(value: str, unit: str, said: str) -> None:
    text = tall([(0, "a", "byte", "5"), (1, "a", unit, value)])
    with pytest.raises(NotCountedError, match=f"counter a {said}") as caught:
        parse(text, ["a"])
    assert caught.value.status == Status.UNSUPPORTED


def test_a_counter_that_is_missing_in_some_kernel_is_not_zero() -> None:
    text = tall([(0, "a", "byte", "5"), (0, "b", "inst", "1"), (1, "a", "byte", "5")])
    assert parse(text, ["a"]) == {"a": 10}
    with pytest.raises(NotCountedError, match="counter b says 'nothing'"):
        parse(text, ["a", "b"])
    with pytest.raises(NotCountedError, match="counter c says 'nothing'"):
        parse(broad(["a"], ["byte"], ("5",)), ["a", "c"])


@pytest.mark.parametrize(
    "text", ["", "==WARNING== No kernels were profiled.", broad(["a"], ["byte"])]
)
def test_no_kernel_is_no_figure(text: str) -> None:
    with pytest.raises(NotCountedError, match="profiled no kernel"):
        parse(text, ["a"])


def test_a_run_that_hangs_is_ended_with_what_it_watches(
    fake_ncu: FakeNcu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    fake_ncu(
        f"p = subprocess.Popen(['/bin/sleep', '60'])\nopen({str(pid)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(60)"
    )
    monkeypatch.setattr(ncu, "PATIENCE_S", 2.0)
    with pytest.raises(NotCountedError, match="took longer than 2 s"):
        ncu.counted({BYTES: 1}, CPU, "copy")
    state = Path(f"/proc/{pid.read_text()}/stat")
    # A killed process ends when it is scheduled next.
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "what it watches is still there"
        time.sleep(0.05)
