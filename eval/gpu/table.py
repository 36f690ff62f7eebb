"""CSV files that grow a row at a time and say what they already hold."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from archs.errors import UserError


class Table:
    """Rows of one kind in one file, each known by some of its columns.

    Raises UserError where the file has other columns or the disk refuses.
    """

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str]) -> None:
        self.path = path
        self.columns = tuple(columns)
        self.key = tuple(key)
        self.rows: list[dict[str, str]] = []
        if path.exists():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                # A killed process left a part of its last row.
                path.write_text(whole, encoding="utf-8")
            reader = csv.DictReader(io.StringIO(whole))
            self.rows = list(reader)
            if whole and tuple(reader.fieldnames or ()) != self.columns:
                raise UserError(
                    f"'{path}' has columns {reader.fieldnames}, not {list(self.columns)}; "
                    "choose another --out"
                )

    def find(self, **key: object) -> dict[str, str] | None:
        """The row of that key, if it is there."""
        wanted = {name: str(value) for name, value in key.items()}
        return next((r for r in self.rows if {k: r[k] for k in self.key} == wanted), None)

    def append(self, row: dict[str, object]) -> None:
        """Add one row at the end of the file."""
        held = {name: _plain(row.get(name)) for name in self.columns}
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        writer.writerow(held)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be written: {error.strerror}") from error
        self.rows.append(held)


def _plain(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
