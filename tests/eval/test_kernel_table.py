"""The table of kernels compiled ahead of time: whole, sound, and what the compiler still makes."""

from pathlib import Path
from random import SystemRandom

import pandas as pd
import pytest
from rich.console import Console

from archs.errors import UserError
from eval.cli.show import write_csv
from eval.measure.progress import Progress
from eval.proof import kernel_table as table
from eval.proof.kernel_table import OPS, Row, cells, kernel_table, read_table
from kernels.aot.ahead import TARGETS

COMMITTED = "leaderboards/ahead-of-time/cells.csv"
REMEDY = f"run `decodebench kernels --all --out {COMMITTED}`, which compiles what changed"
ROOT = Path(__file__).parents[2]
QUIET = Progress(Console(), quiet=True)


def test_some_ops_compile_for_hopper_to_what_the_table_says() -> None:
    """All do, in the table; compiling them again takes a minute and a half."""
    known = read_table(ROOT / COMMITTED)
    first = cells(["sm_90"], every=False)
    assert [cell.op for cell in first] == list(OPS)
    # A table of pages is looked up number by number.
    wide = [known[cell.key]["loads"] for cell in first if cell.op != "block_pages"]
    assert all("x16B" in loads for loads in wide)
    again = SystemRandom().sample(first, 4)
    assert kernel_table(again, progress=QUIET) == [known[cell.key] for cell in again]


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(UserError, match=r"sm_91.*sm_90"):
        cells(["sm_91"], every=False)


def test_the_committed_table_holds_every_cell_and_all_are_sound() -> None:
    known = read_table(ROOT / COMMITTED)
    wanted = {cell.key: cell for cell in cells(list(TARGETS), every=True)}
    missing = [cell for key, cell in wanted.items() if key not in known]
    assert not missing, f"{len(missing)} cells are new or changed, {missing[:3]}: {REMEDY}"
    assert not known.keys() - wanted.keys(), f"cells that are no more are in it: {REMEDY}"
    rows = kernel_table(list(wanted.values()), known, progress=QUIET)
    assert rows == list(known.values()), f"names or faults differ: {REMEDY}"
    assert {row["faults"] for row in rows} == {""}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_random_eightieth_compiles_to_what_the_table_says() -> None:
    known = read_table(ROOT / COMMITTED)
    every = cells(list(TARGETS), every=True)
    again = kernel_table(SystemRandom().sample(every, len(every) // 80), progress=QUIET)
    assert [row for row in again if row != known[row["key"]]] == []


def test_only_what_changed_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = cells(["sm_90"], every=True, ops=["conv_step"])
    compiled = []

    def compile_one(cell: table.Cell) -> Row:
        compiled.append(cell)
        return row_of(cell)

    monkeypatch.setattr(table, "compiled", compile_one)
    path = tmp_path / "cells.csv"
    assert read_table(path) == {}
    first = kernel_table(wanted, read_table(path), progress=QUIET)
    assert compiled == wanted
    write_csv(pd.DataFrame(first), path)
    known = read_table(path)
    assert kernel_table(wanted, known, progress=QUIET) == first and compiled == wanted
    del known[wanted[2].key]
    assert kernel_table(wanted, known, progress=QUIET) == first
    assert compiled == [*wanted, wanted[2]]


def test_what_was_compiled_is_kept_where_compiling_ends_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = cells(["sm_90"], every=True, ops=["conv_step"])[:4]
    kept: list[list[Row]] = []

    def compile_some(cell: table.Cell) -> Row:
        if cell == wanted[3]:
            raise KeyboardInterrupt
        return row_of(cell)

    monkeypatch.setattr(table, "compiled", compile_some)
    known = {"another": {"key": "another"}}
    with pytest.raises(KeyboardInterrupt):
        kernel_table(wanted, known, progress=QUIET, keep=kept.append)
    assert [row["key"] for row in kept[0]] == ["another", *(cell.key for cell in wanted[:3])]


def test_what_counts_as_a_fault_is_judged_anew() -> None:
    cell = cells(["sm_90"], every=False, ops=["conv_step"])[0]
    spilling = {**row_of(cell), "spill_bytes": 8, "faults": ""}
    (row,) = kernel_table([cell], {cell.key: spilling}, progress=QUIET)
    assert row["faults"] == "spills 8 bytes"


def row_of(cell: table.Cell) -> Row:
    return {
        "op": cell.op, "variant": cell.variant.name, "target": cell.target, "registers": 32,
        "spill_bytes": 0, "scalar_spills": 0, "shared_bytes": 0, "loads": "9x16B 3x4B",
        "loads_in_loops": "", "matrix_instructions": 0, "faults": "", "key": cell.key,
    }  # fmt: skip
