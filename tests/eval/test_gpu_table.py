"""Tables that grow a row at a time: torn rows, empty files, disks that refuse."""

from pathlib import Path

import pytest

from archs.errors import UserError
from eval.proof.gpu.table import Table


def test_a_torn_row_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    table = Table(path, ("op", "value", "note"), ("op",))
    table.append({"op": "a", "value": 1 / 3})
    table.append({"op": "b", "value": None, "note": "commas, and 'quotes'"})
    path.write_text(path.read_text() + "c,0.1")
    again = Table(path, ("op", "value", "note"), ("op",))
    assert [r["op"] for r in again.rows] == ["a", "b"]
    assert again.find(op="a") == {"op": "a", "value": "0.333333", "note": ""}
    again.append({"op": "c"})
    assert path.read_text().endswith("\nc,,\n") and path.read_text().count("value") == 1
    path.write_text("")
    Table(path, ("op", "value"), ("op",)).append({"op": "a"})
    assert path.read_text() == "op,value\na,\n"


def test_what_is_to_be_measured_again_stays_until_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    columns = ("op", "status")
    first = Table(path, columns, ("op",), lambda row: row["status"] == "error")
    for op, status in (("a", "ok"), ("b", "error"), ("c", "ok")):
        first.append({"op": op, "status": status})
    assert first.find(op="b") is not None, "this call has just tried it"
    later = Table(path, columns, ("op",), lambda row: row["status"] == "error")
    assert later.find(op="a") is not None and later.find(op="b") is None
    assert "b,error" in path.read_text()
    later.append({"op": "b", "status": "ok"})
    assert path.read_text() == "op,status\na,ok\nc,ok\nb,ok\n"
    assert later.find(op="b") == {"op": "b", "status": "ok"}
    later.append({"op": "d", "status": "error"})
    assert path.read_text().count("op,status") == 1 and not list(tmp_path.glob("*.new"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Table(tmp_path / "file" / "t.csv", ("op",), ("op",)).append({"op": "a"})
