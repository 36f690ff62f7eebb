"""The long table: points are whole, nothing is lost, and foreign tables are refused."""

import errno
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from archs.checks import parse
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.measure import provenance as told
from eval.measure.provenance import hardware_name, provenance
from eval.results.folder import Results
from eval.results.point import Point
from eval.results.rows import CELL_FAILED, COLUMNS, About, Found, Row, Status
from eval.results.schema import load_long
from tests.eval.synthetic import HERE

POINT = Point(
    arch="gqa", stage="decode", scale="70m", batch=8, model={"arch": "gqa"}, options={"steps": 3}
)
ABOUT = About(pattern="gqa gqa", params=1000, corpus="sotu", tokens=4096)
ROWS = [
    Row(measure="tpot_ms", value=0.1 + 0.2, low=0.25, high=0.375, n=12, context=256),
    Row(measure="mbu", value=0.5, context=256, note="two\nlines, and 'quotes\"\r\n"),
    Row(measure="loss_at_position", value=2.0, position=64),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.csv"


def measured(rows: Iterable[Row] = ROWS) -> Found:
    return Found(about=ABOUT, rows=tuple(rows))


def recorded(path: Path, *points: Point, rows: Iterable[Row] = ROWS) -> Results:
    """A run folder whose table holds these points, in which all have the same rows."""
    results = Results(path.parent, HERE)
    for point in points or (POINT,):
        results.record(point, measured(rows))
    results.merge(points or (POINT,))
    return results


# -- what is written --


def test_what_is_recorded_is_read_back(path: Path) -> None:
    recorded(path)
    long = load_long(path)
    assert list(long.columns) == COLUMNS
    first = long.iloc[0]
    assert first["value"] == 0.1 + 0.2
    assert (first["low"], first["high"], first["n"]) == (0.25, 0.375, 12)
    assert (first["batch"], first["context"], first["status"]) == (8, 256, "ok")
    assert first["cell"] == POINT.key
    assert long["position"].tolist()[2] == 64
    assert long["position"].isna().tolist() == [True, True, False]
    assert long["note"].tolist() == ["", "two lines, and 'quotes\"", ""]
    assert long["row"].tolist() == ["1/3", "2/3", "3/3"]
    assert path.read_text().count("\n") == 4


def test_every_row_says_where_it_comes_from(path: Path) -> None:
    recorded(path)
    long = load_long(path)
    for source in (ABOUT, HERE):
        for field in fields(source):
            assert set(long[field.name].astype(str)) == {str(getattr(source, field.name))}


def test_a_table_holds_the_points_that_are_asked_for_in_their_order(path: Path) -> None:
    single = replace(POINT, batch=1)
    results = recorded(path, POINT, single)
    assert load_long(path)["batch"].tolist() == [8, 8, 8, 1, 1, 1]
    results.merge([single, replace(POINT, batch=4)])
    assert load_long(path)["batch"].tolist() == [1, 1, 1]
    assert results.held(POINT) is not None


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
    recorded(path, rows=[Row(measure=CELL_FAILED, status=status)])
    long = load_long(path)
    assert long["status"].tolist() == [status.value]
    assert long["value"].isna().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_a_status(path: Path, value: float) -> None:
    row = Row(measure="train_loss", value=value, low=value, high=1.0)
    recorded(path, rows=[row])
    long = load_long(path)
    assert long["status"].tolist() == ["nan"]
    assert long["value"].isna().all()
    assert long["high"].tolist() == [1.0]


def test_an_unknown_measure_is_refused_and_nothing_written(path: Path) -> None:
    results = Results(path.parent, HERE)
    with pytest.raises(UserError, match=r"measure 'tpot'.*Did you mean 'tpot_ms'"):
        results.record(POINT, measured([ROWS[0], Row(measure="tpot", value=1.0)]))
    assert results.held(POINT) is None


# -- points --


OTHERS = {
    "arch": "mqa", "stage": "train", "scale": "1b", "seed": 1, "batch": 1, "device": "cuda",
    "model": {"arch": "gqa", "hidden": 3}, "source": "0123", "options": {"steps": 4},
}  # fmt: skip


def test_every_field_of_a_point_makes_another_point() -> None:
    assert OTHERS.keys() == {f.name for f in fields(Point)}
    others = [replace(POINT, **{name: value}) for name, value in OTHERS.items()]
    assert len({p.digest for p in (POINT, *others)}) == len({POINT, *others}) == len(OTHERS) + 1


def test_a_point_comes_back_from_its_text() -> None:
    spec = asdict(
        ModelSpec(arch="gqa", scale=get_scale("tiny"), overrides={"gqa": {"kv_heads": 1}})
    )
    point = replace(POINT, model=spec, options={"learning_rates": (1e-3, 0.1), "quality": None})
    again = Point.from_json(point.to_json())
    assert again == point and again.digest == point.digest and hash(again) == hash(point)
    assert parse(ModelSpec, again.model, "model") == parse(ModelSpec, spec, "model")
    with pytest.raises(UserError, match="lacks 'stage'"):
        Point.from_json("{}")


def test_a_recorded_point_is_held_and_only_that(path: Path) -> None:
    results = Results(path.parent, HERE)
    assert results.held(POINT) is None
    recorded(path)
    again = Results(path.parent, replace(HERE, config_hash="another", commit="later"))
    assert len(again.held(POINT) or ()) == len(ROWS)
    for name, value in OTHERS.items():
        assert again.held(replace(POINT, **{name: value})) is None
    again.drop(POINT)
    assert again.held(POINT) is None


def test_a_full_disk_leaves_earlier_points_intact(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = recorded(path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    other = replace(POINT, batch=1)
    with monkeypatch.context() as patch:
        patch.setattr("archs.files.os.fsync", full)
        with pytest.raises(UserError, match=r"No space left.*free some space"):
            results.record(other, measured())
    assert results.held(POINT) and results.held(other) is None
    assert [p.name for p in (path.parent / "points").iterdir()] == [results.path(POINT).name]
    results.record(other, measured())
    assert results.held(other)


def test_a_damaged_file_is_named_and_not_taken_for_a_result(path: Path) -> None:
    results = recorded(path)
    file = results.path(POINT)
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    for text in ("", "a,b\n1,2\n", lines[0], "".join(lines[:-1]), "".join(lines[:2] + lines[3:])):
        file.write_text(text)
        with pytest.raises(UserError, match=r"points/decode-gqa.* is damaged.*remove it"):
            Results(results.folder, results.provenance).held(POINT)
    file.write_text(whole)
    assert Results(results.folder, results.provenance).held(POINT)


# -- tables from elsewhere --


def replaced(path: Path, column: str, value: str) -> None:
    """Put a value into the second row of a written table."""
    recorded(path)
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
    recorded(path)
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
    monkeypatch.setattr(told, "__file__", str(tmp_path / "eval" / "measure" / "provenance.py"))
    assert told._commit() == "unknown"
    (tmp_path / "COMMIT").write_text("abc1234-dirty\n")
    assert told._commit() == "abc1234-dirty"


def test_a_commit_of_somebody_elses_repository_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.check_output(["git", *who, *arguments], cwd=tmp_path, text=True).strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "theirs")
    theirs = git("rev-parse", "HEAD")
    installed = tmp_path / ".venv" / "site-packages" / "eval" / "measure"
    installed.mkdir(parents=True)
    monkeypatch.setattr(told, "__file__", str(installed / "provenance.py"))
    assert told._commit() == "unknown"
    ours = told._commit
    monkeypatch.undo()
    before = ours()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert ours() == before and not theirs.startswith(before.partition("-")[0])
    monkeypatch.setattr(told, "__file__", str(tmp_path / "eval" / "measure" / "provenance.py"))
    monkeypatch.delenv("GIT_DIR")
    (tmp_path / "eval").mkdir()
    assert theirs.startswith(ours().partition("-")[0])
