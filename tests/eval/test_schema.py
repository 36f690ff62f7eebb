"""The schema: documented as it is, versioned, and a stranger's table told row by row."""

import csv
from pathlib import Path

import pytest

from archs.errors import UserError
from eval.report.leaderboard import wide
from eval.results.measures import MEASURES
from eval.results.rows import COLUMNS, SCHEMA
from eval.results.schema import LONG, check_long, document, load_long
from tests.eval.conftest import Command
from tests.eval.synthetic import write_run

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", seeds=1, archs=("gqa", "gdn")) / "results.csv"


def put(path: Path, line: int, **values: str) -> None:
    """Put values into a line of the file, 1 being the header."""
    rows = list(csv.reader(path.read_text().splitlines()))
    for column, value in values.items():
        rows[line - 1][COLUMNS.index(column)] = value
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def test_the_page_is_the_schema_and_names_every_column_and_measure() -> None:
    page = document()
    assert (ROOT / "leaderboards" / "SCHEMA.md").read_text() == page
    for name in (*LONG, *MEASURES):
        assert f"| `{name}` |" in page


def test_committed_tables_are_sound() -> None:
    committed = sorted((ROOT / "leaderboards").glob("**/results.csv"))
    assert committed
    for path in committed:
        assert check_long(path) == [], path


def test_a_sound_table_has_no_faults(table: Path) -> None:
    assert check_long(table) == []
    assert set(load_long(table)["schema"]) == {SCHEMA}


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"value": "fast"}, "value='fast' is not a number"),
        ({"batch": "1.5"}, "batch='1.5' is no integer"),
        ({"seed": "99999999999999999999"}, "seed='99999999999999999999' exceeds 900719"),
        ({"tokens": "9007199254740993"}, "tokens='9007199254740993' exceeds 900719"),
        ({"row": "0/9"}, "row='0/9' is not the number of a row in its cell"),
        ({"n": ""}, "n is empty; it needs an integer"),
        ({"measure": "tpot"}, "unknown measure 'tpot'; did you mean 'tpot_ms'?"),
        ({"status": "okay"}, "unknown status 'okay'; did you mean 'ok'?"),
        ({"value": ""}, "status is ok and value is empty; a failure needs its status"),
        ({"status": "incorrect"}, "beside status 'incorrect'; a failure has no figure"),
        ({"value": "-1.0"}, "value=-1 is negative"),
        ({"batch": "-8"}, "batch=-8 is negative"),
        ({"measure": "accuracy", "value": "99.0"}, "accuracy=99 exceeds 1"),
        ({"low": "3.0", "high": "2.0"}, "low=3 exceeds high=2"),
        ({"low": "3.0", "high": ""}, "one end of the interval is empty; give both or none"),
        ({"hardware": ""}, "hardware is empty"),
        ({"arch": ""}, "arch is empty; only figures of the machine have none"),
        ({"started_at": "yesterday"}, "started_at='yesterday' is not an ISO 8601 time"),
        ({"started_at": "2026-01-02T03:04:05"}, "is not an ISO 8601 time with a zone"),
    ],
)
def test_a_fault_is_told_with_its_row(table: Path, values: dict[str, str], what: str) -> None:
    line = next(
        i for i, text in enumerate(table.read_text().splitlines(), 1) if ",cost,70m," in text
    )
    put(table, line, **values)
    (fault,) = check_long(table)
    assert fault.line == line
    assert what in fault.what


def test_a_figure_that_stands_twice_with_another_value_is_told(table: Path) -> None:
    lines = table.read_text().splitlines()
    at = next(i for i, text in enumerate(lines) if ",tpot_p50_ms," in text)
    table.write_text("\n".join([*lines, lines[at]]) + "\n")
    assert check_long(table) == []
    put(table, len(lines) + 1, value="12345.0")
    (fault,) = check_long(table)
    assert fault.line == len(lines) + 1
    assert fault.what.startswith(f"value=12345, but row {at + 1} gives ")


def test_a_cell_without_its_last_rows_is_told(table: Path) -> None:
    lines = table.read_text().splitlines()
    cell, number = lines[-1].split(",")[:2]
    total = int(number.partition("/")[2])
    table.write_text("\n".join(lines[:-2]) + "\n")
    (fault,) = check_long(table)
    assert fault.line == len(lines) - 2
    assert fault.what == f"cell '{cell}' lacks 2 of its {total} rows, such as {total - 1}/{total}"


def test_all_faults_are_told_in_the_order_of_the_rows(table: Path) -> None:
    put(table, 9, measure="speed")
    put(table, 5, value="x")
    put(table, 7, n="")
    assert [fault.line for fault in check_long(table)] == [5, 7, 9]
    with pytest.raises(UserError, match=r"row 5: value='x' .*\(2 more: `leaderboard --check`"):
        load_long(table)


def test_a_table_without_the_column_is_of_version_1(table: Path) -> None:
    lines = [line.rpartition(",")[0] for line in table.read_text().splitlines()]
    table.write_text("\n".join(lines) + "\n")
    assert check_long(table) == []
    assert set(load_long(table)["schema"]) == {1}


def test_spreads_of_earlier_versions_are_not_read_as_intervals() -> None:
    """Committed tables of version 2: percentiles of steps, extremes of three repeats."""
    path = ROOT / "leaderboards" / "cpu-2-threads" / "2026-11-23" / "results.csv"
    table = load_long(path)
    held = table[table["low"].notna()]
    assert set(held["measure"]) == {"bits_per_byte", "loss_at_position", "accuracy"}
    assert (table["measure"] == "tpot_ms").any()


def test_tasks_of_earlier_versions_are_read_under_their_new_names() -> None:
    """Committed tables of version 3 had a stage and two measures for one task."""
    path = ROOT / "leaderboards" / "cpu-2-threads" / "2026-11-26-tiny" / "results.csv"
    table = load_long(path)
    task = table[table["stage"] == "task"]
    assert set(task["measure"]) == {"accuracy", "steps_to_99", "learning_rate"}
    assert set(task["scale"]) == {"mqar"} and set(table["options"]) == {""}
    assert "accuracy@mqar/c24" in wide(table)


def test_a_newer_table_is_refused(table: Path) -> None:
    put(table, 2, schema=str(SCHEMA + 1))
    with pytest.raises(UserError, match=rf"has schema {SCHEMA + 1}, this program knows up to"):
        check_long(table)


def test_a_wide_leaderboard_is_told_from_results(tmp_path: Path) -> None:
    (tmp_path / "leaderboard.csv").write_text("rank,arch\n1,gqa\n")
    with pytest.raises(UserError, match="is a wide leaderboard, made from a results table"):
        check_long(tmp_path / "leaderboard.csv")


def test_the_command_names_every_row_and_fails(decodebench: Command, table: Path) -> None:
    assert decodebench("leaderboard", "--check", str(table)).out.startswith("sound: ")
    put(table, 5, value="x")
    put(table, 6, status="fine")
    outcome = decodebench("leaderboard", "--check", str(table))
    assert outcome.code == 1
    first, second = outcome.out.splitlines()
    assert first == f"{table} row 5: value='x' is not a number"
    assert second.startswith(f"{table} row 6: unknown status 'fine'")


def test_the_command_prints_the_schema(decodebench: Command) -> None:
    assert decodebench("leaderboard", "--schema").out == document()
