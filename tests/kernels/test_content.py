"""A table of compiled kernels is known by content: every change to the code shows, nothing else."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import pytest

from eval.proof.kernel_table import OPS
from kernels.aot.ahead import Variant
from kernels.aot.content import content_key

HELPERS = """
import triton
import triton.language as tl

@triton.jit
def scaled(x):
    return 2.0 * x
"""
SOURCE = """
import triton
import triton.language as tl
import helpers
from helpers import scaled

SHIFT = tl.constexpr(3)

@triton.jit
def shifted(x):
    return scaled(x) + SHIFT

@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, shifted(tl.load(x + at)), at < n)
"""
VARIANT = Variant(
    name="a", kernel=None, signature={"x": "*fp32", "n": "i32"}, constexprs={"BLOCK": 64},
    divisible=frozenset({"x"}),
)  # fmt: skip


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Hashes the kernel of both files, in which `old` has become `new`, with what else is asked."""

    def key(old: str = SOURCE, new: str = SOURCE, target: str = "sm_90", **changed: object) -> str:
        folder = Path(mkdtemp(dir=tmp_path))
        monkeypatch.syspath_prepend(folder)
        for name, text in (("helpers", HELPERS), ("source", SOURCE)):
            monkeypatch.delitem(sys.modules, name, raising=False)
            (folder / f"{name}.py").write_text(text.replace(old, new))
        kernel = importlib.import_module("source").kernel
        return content_key(replace(VARIANT, kernel=kernel, **changed), target)

    return key


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2.0 * x", "3.0 * x"),
        ("constexpr(3)", "constexpr(4)"),
        ("scaled(x) + SHIFT", "scaled(x) - SHIFT"),
        ("at < n", "at <= n"),
        ("+ SHIFT", "+ helpers.scaled(SHIFT)"),
    ],
)
def test_what_a_kernel_is_made_of_changes_its_key(
    key: Callable[..., str], old: str, new: str
) -> None:
    assert key(old, new) != key()


@pytest.mark.parametrize(
    "changed",
    [
        {"signature": {"x": "*bf16", "n": "i32"}},
        {"constexprs": {"BLOCK": 128}},
        {"divisible": frozenset()},
        {"num_warps": 8},
        {"num_stages": 2},
        {"target": "sm_80"},
    ],
    ids=str,
)
def test_how_it_is_compiled_changes_its_key(
    key: Callable[..., str], changed: dict[str, object]
) -> None:
    assert key(**changed) != key()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("SHIFT = ", "# A comment, and other lines.\n\n\nSHIFT = "),
        ("return 2.0 * x", '"""Twice x."""\n    return 2.0 * x  # Twice.'),
        ("at < n)", "at   <   n\n    )"),
    ],
)
def test_how_it_is_written_does_not(key: Callable[..., str], old: str, new: str) -> None:
    assert key(old, new) == key()


def test_names_and_limits_do_not(key: Callable[..., str]) -> None:
    assert key(name="b", spills=24, wide_loads=0) == key()


def test_no_key_depends_on_where_something_lies_in_memory() -> None:
    for module in OPS.values():
        for variant in module.variants():
            assert "0x" not in repr(sorted(variant.constexprs.items()))
