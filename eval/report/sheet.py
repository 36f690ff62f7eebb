"""A table for a terminal of any width: long cells are folded, and no figure is ever cut.

Columns that hold one value in every row move above the table; what is still too wide is told in
blocks of columns, each with the columns that tell the rows apart; and where even these leave no
room, a row is a list of its figures.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

#: Blanks between two columns.
GAP = 2
#: Text wraps at blanks down to this width; single words that are longer are folded.
TEXT_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Field:
    """A title, whose words may stand below each other, and a cell for each row.

    number: right-aligned, in one piece. key: one of those that tell rows apart. below: dim words
    under the title.
    """

    title: str
    cells: tuple[str, ...]
    number: bool = False
    key: bool = False
    below: str = ""

    @property
    def full_width(self) -> int:
        """The width at which no cell wraps."""
        return max(map(cell_len, self.cells), default=0)

    @property
    def least_width(self) -> int:
        """The width at which only text wraps, and titles between their words."""
        whole = self.full_width if self.number else min(self.full_width, TEXT_WIDTH)
        words = f"{self.title} {self.below}".split()
        return max(whole, *(min(len(word), TEXT_WIDTH) for word in words), 1)

    def heading(self, width: int) -> Text:
        """The title in lines of at most `width`."""
        lines = ["\n".join(textwrap.wrap(text, width)) for text in (self.title, self.below)]
        return Text.assemble(lines[0], *([("\n" + lines[1], "dim")] if lines[1] else []))

    @property
    def name(self) -> str:
        """Title and words below it, in one line."""
        return f"{self.title} {self.below}".strip()


@dataclass(frozen=True, slots=True)
class Sheet:
    """Columns of equally many cells, drawn as wide as the console is."""

    fields: tuple[Field, ...]

    @property
    def row_count(self) -> int:
        """The number of rows."""
        return len(self.fields[0].cells) if self.fields else 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _drawn(self.fields, options.max_width)


def _drawn(fields: Sequence[Field], width: int) -> Iterator[Table | Text]:
    if _least(fields) <= width:
        yield _table(fields, width)
        return
    told, fields = _split_constants(fields)
    if told:
        yield Text("; ".join(f"{field.name} {field.cells[0]}" for field in told))
    keys = [field for field in fields if field.key]
    others = [field for field in fields if not field.key]
    if max((_least([*keys, other]) for other in others), default=_least(keys)) > width:
        yield from _records(fields, width)
        return
    block = list(keys)
    for other in others:
        if _least([*block, other]) > width:
            yield _table(block, width)
            block = list(keys)
        block.append(other)
    yield _table(block, width)


def _least(fields: Sequence[Field]) -> int:
    return sum(field.least_width + GAP for field in fields) - GAP


def _split_constants(fields: Sequence[Field]) -> tuple[list[Field], list[Field]]:
    """Columns with one short value in all rows, and the others, the first field among these."""
    told = [
        field
        for field in fields[1:]
        if len(field.cells) > 1 and len(set(field.cells)) == 1
        and 0 < field.full_width <= TEXT_WIDTH
    ]  # fmt: skip
    return told, [field for field in fields if field not in told]


def _widths(fields: Sequence[Field], width: int) -> list[int]:
    """The columns' widths: room beyond the least widths goes to text that wraps, then to titles."""
    widths = [field.least_width for field in fields]
    for wanted in ([f.full_width for f in fields], [cell_len(f.title) for f in fields]):
        left = width - sum(widths) - GAP * (len(fields) - 1)
        lacking = [max(full - held, 0) for full, held in zip(wanted, widths, strict=True)]
        share = min(1.0, left / max(sum(lacking), 1))
        widths = [held + int(share * lack) for held, lack in zip(widths, lacking, strict=True)]
    return widths


def _table(fields: Sequence[Field], width: int) -> Table:
    drawn = Table(
        box=box.SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False,
        padding=(0, GAP - 1, 0, 0),
    )  # fmt: skip
    for field, wide in zip(fields, _widths(fields, width), strict=True):
        drawn.add_column(
            field.heading(wide), justify="right" if field.number else "left", width=wide,
            overflow="fold",
        )  # fmt: skip
    for cells in zip(*(field.cells for field in fields), strict=True):
        drawn.add_row(*cells)
    return drawn


def _records(fields: Sequence[Field], width: int) -> Iterator[Text]:
    """Each row as a list of its cells."""
    longest = min(max(len(field.name) for field in fields), width // 2)
    for cells in zip(*(field.cells for field in fields), strict=True):
        for field, cell in zip(fields, cells, strict=True):
            if cell:
                yield Text(f"{field.name:<{longest}}  {cell}", overflow="fold")
        yield Text("")
