"""The long table: appends are whole, kills lose nothing, and foreign tables are refused."""

import errno
import os
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from archs.errors import UserError
from eval import results
from eval.results import (
    CELL_FAILED,
    COLUMNS,
    About,
    Cell,
    Results,
    Row,
    Status,
    hardware_name,
    provenance,
)
from eval.schema import load_long
from tests.eval.synthetic import HERE

CELL = Cell(arch="gqa", stage="decode", scale="70m", batch=8)
ABOUT = About(pattern="gqa gqa", params=1000, corpus="sotu", tokens=4096)
ROWS = [
    Row(measure="tpot_ms", value=0.1 + 0.2, low=0.25, high=0.375, n=12, context=256),
    Row(measure="mbu", value=0.5, context=256, note="two\nlines, and 'quotes\"\r\n"),
    Row(measure="loss_at_position", value=2.0, position=64),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "results.csv"


def append(path: Path, batch: int = 8) -> Results:
    results = Results(path, HERE)
    results.append(replace(CELL, batch=batch), ABOUT, ROWS)
    return results


# -- what is written --


def test_what_is_appended_is_read_back(path: Path) -> None:
    append(path)
    long = load_long(path)
    assert list(long.columns) == COLUMNS
    first = long.iloc[0]
    assert first["value"] == 0.1 + 0.2
    assert (first["low"], first["high"], first["n"]) == (0.25, 0.375, 12)
    assert (first["batch"], first["context"], first["status"]) == (8, 256, "ok")
    assert first["cell"] == CELL.key
    assert long["position"].tolist()[2] == 64
    assert long["position"].isna().tolist() == [True, True, False]
    assert long["note"].tolist() == ["", "two lines, and 'quotes\"", ""]
    assert long["row"].tolist() == ["1/3", "2/3", "3/3"]
    assert path.read_text().count("\n") == 4


def test_every_row_says_where_it_comes_from(path: Path) -> None:
    append(path)
    long = load_long(path)
    for source in (ABOUT, HERE):
        for field in fields(source):
            assert set(long[field.name].astype(str)) == {str(getattr(source, field.name))}


def test_the_second_append_writes_no_second_header(path: Path) -> None:
    append(path)
    append(path, batch=1)
    assert load_long(path)["batch"].tolist() == [8, 8, 8, 1, 1, 1]


def test_this_machine_and_this_code_are_named() -> None:
    found = provenance("c0ffee", torch.device("cpu"))
    assert found.config_hash == "c0ffee"
    assert found.hardware == hardware_name(torch.device("cpu"))
    assert found.hardware.endswith(" threads")
    assert found.torch == torch.__version__
    assert len(found.started_at) == len("2026-01-02T03:04:05+00:00")
    assert found.commit


@pytest.mark.parametrize("status", list(Status))
def test_statuses_are_kept(path: Path, status: Status) -> None:
    Results(path, HERE).append(CELL, ABOUT, [Row(measure=CELL_FAILED, status=status)])
    long = load_long(path)
    assert long["status"].tolist() == [status.value]
    assert long["value"].isna().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_a_status(path: Path, value: float) -> None:
    row = Row(measure="train_loss", value=value, low=value, high=1.0)
    Results(path, HERE).append(CELL, ABOUT, [row])
    long = load_long(path)
    assert long["status"].tolist() == ["nan"]
    assert long["value"].isna().all()
    assert long["high"].tolist() == [1.0]


def test_an_unknown_measure_is_refused_and_nothing_written(path: Path) -> None:
    results = Results(path, HERE)
    with pytest.raises(UserError, match=r"measure 'tpot'.*Did you mean 'tpot_ms'"):
        results.append(CELL, ABOUT, [ROWS[0], Row(measure="tpot", value=1.0)])
    assert not path.exists()
    assert not results.done(CELL)


# -- resuming --


def test_a_recorded_cell_is_done_and_only_that(path: Path) -> None:
    assert not Results(path, HERE).done(CELL)
    assert append(path).done(CELL)
    reopened = Results(path, HERE)
    assert reopened.done(CELL)
    for other in (
        replace(CELL, arch="mqa"), replace(CELL, stage="train"), replace(CELL, scale="1b"),
        replace(CELL, seed=1), replace(CELL, batch=1), replace(CELL, section=1),
    ):  # fmt: skip
        assert not reopened.done(other)


def test_a_failed_cell_is_done(path: Path) -> None:
    Results(path, HERE).append(CELL, ABOUT, [Row(measure=CELL_FAILED, status=Status.OOM)])
    assert Results(path, HERE).done(CELL)


def test_results_of_another_configuration_are_refused(path: Path) -> None:
    append(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"another configuration \(c0ffee123456, this is feed\)"):
        Results(path, replace(HERE, config_hash="feed"))
    assert path.read_bytes() == before


def test_a_writer_killed_at_any_byte_costs_only_its_cell(path: Path) -> None:
    """Cut within the second append, at and around line ends too: the first stays, it runs again."""
    append(path)
    whole = path.read_bytes()
    append(path, batch=1)
    both = path.read_bytes()
    ends = [i for i in range(len(whole), len(both)) if both[i : i + 1] == b"\n"]
    around = {end + step for end in ends[:-1] for step in (-1, 0, 1, 2)}
    for length in sorted({*range(len(whole), len(both), 23), *around, len(both) - 1}):
        path.write_bytes(both[:length])
        results = Results(path, HERE)
        assert results.done(CELL), length
        assert not results.done(replace(CELL, batch=1)), length
        assert path.read_bytes() == whole, length
    append(path, batch=1)
    assert path.read_bytes() == both


def test_a_writer_killed_in_its_first_append_leaves_an_empty_table(path: Path) -> None:
    append(path)
    both = path.read_bytes()
    header = both.index(b"\n") + 1
    for length in (0, 3, header - 1, header, header + 5, len(both) - 1):
        path.write_bytes(both[:length])
        assert not Results(path, HERE).done(CELL)
        append(path)
        assert path.read_bytes() == both


@pytest.mark.parametrize("short", [True, False], ids=["short write", "error"])
def test_a_full_disk_leaves_earlier_rows_intact(
    path: Path, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    results = append(path)
    before = path.read_bytes()
    honest = os.write

    def full(handle: int, content: bytes) -> int:
        written = honest(handle, content[:100])
        if short:
            return written
        raise OSError(errno.ENOSPC, "No space left on device")

    other = replace(CELL, batch=1)
    with monkeypatch.context() as patch:
        patch.setattr("eval.results.os.write", full)
        with pytest.raises(UserError, match=r"No space left.*intact, free some space"):
            results.append(other, ABOUT, ROWS)
    assert path.read_bytes() == before
    assert not results.done(other)
    results.append(other, ABOUT, ROWS)
    assert Results(path, HERE).done(other)


# -- tables from elsewhere --


def replaced(path: Path, column: str, value: str) -> None:
    """Put a value into the second row of a written table."""
    append(path)
    lines = path.read_text().splitlines()
    cells = lines[2].split(",")
    cells[COLUMNS.index(column)] = value
    lines[2] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("value", "fast", "row 3: value='fast' is not a number"),
        ("value", "inf", "row 3: value='inf' is not a number"),
        ("seed", "inf", "row 3: seed='inf' is not a number"),
        ("batch", "", "row 3: batch is empty"),
        ("measure", "speed", "row 3: unknown measure 'speed'"),
        ("status", "fine", "row 3: unknown status 'fine'"),
    ],
)
def test_a_bad_value_is_named_with_its_place(
    path: Path, column: str, value: str, message: str
) -> None:
    replaced(path, column, value)
    with pytest.raises(UserError) as caught:
        load_long(path)
    assert str(caught.value).startswith(f"'{path}' {message}")


def test_a_table_that_lacks_columns_is_refused(path: Path) -> None:
    append(path)
    path.write_text(path.read_text().replace("config_hash", "config", 1))
    with pytest.raises(UserError, match=r"lacks the columns \['config_hash'\]; name a run folder"):
        load_long(path)


@pytest.mark.parametrize(
    "content", [b"", bytes(range(256)) * 9, b"\xff\xfe,\n1,2\n", b"a\n1,2,3\n"]
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"x.csv' is not a results table: .*name a run folder") as e:
        load_long(tmp_path / "x.csv")
    assert "\n" not in str(e.value)


def test_a_folder_in_place_of_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        load_long(tmp_path)


def test_a_copied_tree_says_its_commit_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "__file__", str(tmp_path / "eval" / "results.py"))
    assert results._commit() == "unknown"
    (tmp_path / "COMMIT").write_text("abc1234-dirty\n")
    assert results._commit() == "abc1234-dirty"


def test_a_commit_of_somebody_elses_repository_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.check_output(["git", *who, *arguments], cwd=tmp_path, text=True).strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "theirs")
    theirs = git("rev-parse", "HEAD")
    installed = tmp_path / ".venv" / "site-packages" / "eval"
    installed.mkdir(parents=True)
    monkeypatch.setattr(results, "__file__", str(installed / "results.py"))
    assert results._commit() == "unknown"
    ours = results._commit
    monkeypatch.undo()
    before = ours()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert ours() == before and not theirs.startswith(before.partition("-")[0])
    monkeypatch.setattr(results, "__file__", str(tmp_path / "eval" / "results.py"))
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "eval").mkdir()
    assert theirs.startswith(ours().partition("-")[0])
