"""The results of a run folder: a file of rows for each point, and the table that they make.

A file appears whole or not at all, so whatever is killed loses at most the point that it was at. A
point whose file is there is not measured again. `results.csv` is the rows of those points that the
run asks for, in its order; files of other points stay, for a run that asks for them again.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from archs.errors import UserError
from archs.files import refusing, write
from eval.results.point import Point
from eval.results.rows import COLUMNS, Found, Provenance, records

#: A line of a table, by column.
Line = Mapping[str, str]

POINTS = "points"
TABLE = "results.csv"


class Results:
    """The results of one run folder, of which this is the only writer."""

    def __init__(self, folder: Path, provenance: Provenance) -> None:
        self.folder = folder
        self.provenance = provenance
        self._read: dict[str, list[Line]] = {}

    def path(self, point: Point) -> Path:
        """Where a point's rows are, or will be."""
        plain = "".join(c if c.isalnum() or c in "-_=." else "_" for c in Path(point.arch).name)
        words = [point.stage, plain, point.scale, f"seed{point.seed}", f"batch{point.batch}"]
        return self.folder / POINTS / f"{'-'.join(filter(None, words))}-{point.digest}.csv"

    def held(self, point: Point) -> list[Line] | None:
        """The rows of a point that was measured. Raises UserError where its file is damaged."""
        if point.key in self._read:
            return self._read[point.key]
        path = self.path(point)
        if not path.exists():
            return None
        with refusing(path, "read"), path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            header, lines = table.fieldnames, list[Line](table)
        numbers = [f"{n}/{len(lines)}" for n in range(1, len(lines) + 1)]
        if header != COLUMNS or not lines or [r["row"] for r in lines] != numbers:
            raise UserError(
                f"'{path}' is damaged, or of another version of this program; remove it, and the "
                "same command measures that point again"
            )
        self._read[point.key] = lines
        return lines

    def record(self, point: Point, found: Found) -> None:
        """Keep a point's rows, all or none. Raises UserError when the disk refuses."""
        path = self.path(point)
        with refusing(path, "written"):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._read.pop(point.key, None)
        write_table(path, records(point, found, self.provenance))

    def drop(self, point: Point) -> None:
        """Forget a point's rows."""
        self._read.pop(point.key, None)
        self.path(point).unlink(missing_ok=True)

    def merge(self, points: Iterable[Point]) -> None:
        """Make the table of these points, of those that were measured."""
        lines: list[Mapping[str, object]] = []
        for point in points:
            for line in self.held(point) or ():
                # Which configuration asked for it is the run's to say, not the point's.
                lines.append({**line, "config_hash": self.provenance.config_hash})
        write_table(self.folder / TABLE, lines)


def write_table(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write a table of lines by column, whole or not at all. Raises UserError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write(path, text.getvalue())
