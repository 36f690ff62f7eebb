"""CSV files that grow a row at a time and say what they already hold."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from archs.errors import UserError


class Table:
    """Rows of one kind in one file, each known by some of its columns.

    again: says of a row that is found whether it is to be measured again; such a row stays until
      another of its key takes its place.
    Raises UserError where the file has other columns or the disk refuses.
    """

    def __init__(
        self, path: Path, columns: Sequence[str], key: Sequence[str],
        again: Callable[[Mapping[str, str]], bool] = lambda row: False,
    ) -> None:  # fmt: skip
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

        self._again = {self._key(r) for r in self.rows if again(r)}

    def _key(self, row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.key)

    def find(self, **key: object) -> dict[str, str] | None:
        """The row of that key, if it is there and need not be measured again."""
        wanted = self._key(key)
        if wanted in self._again:
            return None
        return next((r for r in self.rows if self._key(r) == wanted), None)

    def append(self, row: dict[str, object]) -> None:
        """Add one row at the end of the file, in place of one that was to be measured again."""
        held = {name: _plain(row.get(name)) for name in self.columns}
        key = self._key(held)
        stale = key in self._again
        if stale:
            self._again.remove(key)
            self.rows = [r for r in self.rows if self._key(r) != key]
        self.rows.append(held)
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        whole = stale or not self.path.exists() or self.path.stat().st_size == 0
        if whole:
            writer.writeheader()
        writer.writerows(self.rows if whole else [held])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            target = self.path.with_suffix(".new") if whole else self.path
            with target.open("w" if whole else "a", encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
            if whole:
                os.replace(target, self.path)
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be written: {error.strerror}") from error


def _plain(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
