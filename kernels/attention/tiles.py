"""Which rows of a paged cache the i-th tile of a split holds, and which pages they lie in.

Tiles are visited in order: those of the sinks that are older than every window, then all from the
oldest visible row on. Rows that nobody may see repeat one that somebody may, so any page will do.
"""

import triton
import triton.language as tl

#: What a natural logit is multiplied by where exponents are base 2.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(i, sink_tiles, sunk, oldest, last, TILE, WINDOWED):  # type: ignore[no-untyped-def]
    """The positions of the i-th tile to visit, and which to load: hidden ones repeat another."""
    if WINDOWED:
        sink = i < sink_tiles
        tile = tl.where(sink, i, i - sink_tiles + oldest // TILE)
        row = tile * TILE + tl.arange(0, TILE)
        held = tl.maximum(row, tl.where(sink, 0, oldest))
        return row, tl.minimum(held, tl.where(sink, sunk - 1, last))
    else:
        row = i * TILE + tl.arange(0, TILE)
        return row, tl.minimum(row, last)


@triton.jit
def page_of(table, i, sink_tiles, sunk, oldest, last, PAGE, TILE, WINDOWED):  # type: ignore[no-untyped-def]
    """The pool pages of the i-th tile to visit: a single one where a page holds whole tiles."""
    if PAGE % TILE == 0:
        tile = tl.where(i < sink_tiles, i, i - sink_tiles + oldest // TILE)
        return tl.load(table + tile * TILE // PAGE)
    else:
        _, held = rows_of(i, sink_tiles, sunk, oldest, last, TILE, WINDOWED)
        return tl.load(table + held // PAGE)
