"""Keep so many rows of a sequence and drop the others: a policy of the store, on trained models.

- `window64-sinks4`: the newest 64 rows and the first 4 (StreamingLLM, arXiv 2309.17453; rows keep
  the positions that they were turned by).
- `heavy64`: 64 rows; of a full store the one goes whose attention, summed over all tokens so far,
  is least, each KV head choosing its own (H2O, arXiv 2306.14048, algorithm 1).
- `recent64`: the same with a sum that fades by 1/16 a token, so that the last tokens choose, as
  the observation window of SnapKV does (arXiv 2404.14469).

The newest half of the rows is never dropped by either. Rows that are chosen so are a fixed tensor:
they are forked, rolled back and counted as one.
"""

import re
from dataclasses import dataclass, replace
from typing import Self

import torch

from archs.errors import MisfitError, UserError
from archs.formats import Format
from archs.spec import FixedSpec, Keeping, RowSpec

#: What a sum of attention is multiplied by at each token.
FADES = {"heavy": 1.0, "recent": 1 - 1 / 16}
#: Between a tensor's name and that of its rows' attention and positions.
OF_ROWS = "of rows"


class EvictionError(MisfitError):
    """A policy does not fit what an architecture remembers."""


@dataclass(frozen=True, slots=True)
class Eviction:
    """At most `rows` rows, by one of `FADES` or, way "window", the newest, with `sinks` more."""

    way: str
    rows: int
    sinks: int = 0

    @classmethod
    def named(cls, name: str) -> Self | None:
        """From its name; None where it is none. Raises UserError on numbers that cannot be."""
        found = re.fullmatch(rf"({'|'.join((*FADES, 'window'))})(\d+)(?:-sinks(\d+))?", name)
        if found is None:
            return None
        way, rows, sinks = found[1], int(found[2]), int(found[3] or 0)
        if rows < 2:
            raise UserError(f"state format '{name}' keeps {rows} rows; keep 2 or more")
        if way in FADES and found[3]:
            raise UserError(
                f"state format '{name}': sinks are of a window; {way}{rows} finds them by itself"
            )
        return cls(way, rows, sinks)

    def __str__(self) -> str:
        return f"{self.way}{self.rows}" + (f"-sinks{self.sinks}" if self.sinks else "")

    def applied(self, rows: RowSpec) -> tuple[tuple[RowSpec, ...], tuple[FixedSpec, ...]]:
        """What is kept of a row tensor. Raises EvictionError for rows that have a policy of their
        own, or that are no keys and values [2, G, d].
        """
        own = rows.window is not None or rows.every > 1 or rows.picks is not None
        if own or rows.owner is not None or len(rows.shape) != 3 or rows.shape[0] != 2:
            raise EvictionError(
                f"{self} drops keys and values that every token of one layer could see; "
                f"'{rows.name}' of shape {list(rows.shape)} is read otherwise; leave it out for "
                "this architecture"
            )
        if self.way == "window":
            return (replace(rows, window=self.rows, sinks=self.sinks),), ()
        _, heads, dim = rows.shape
        kept = FixedSpec(
            name=rows.name, kind=rows.kind, shape=(2, heads, self.rows, dim), format=rows.format,
            given=rows.given,
            keeps=Keeping(rows=self.rows, newest=self.rows // 2, fade=FADES[self.way]),
        )  # fmt: skip
        told = FixedSpec(
            name=f"{rows.name} {OF_ROWS}", kind="", shape=(2, heads, self.rows),
            format=Format.of(torch.float32),
        )  # fmt: skip
        return (), (kept, told)
