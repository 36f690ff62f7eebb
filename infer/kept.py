"""Parts of a past that outlive their sequence, and sequences that go on from them.

A part holds pages and slots of the store once more, as a fork does, and copies nothing. Parts of
one past, put one after the other, are what a sequence can be opened with: what it writes to then
is copied first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from archs.errors import UserError
from infer.pages import TableKey
from infer.slots import State
from infer.store import StateStore


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Tokens begin..end of a past.

    pages: pool pages by logical page, of each block table; of tables without a window those that
    became full in it. whole: everything else is held, too, that a sequence of `end` tokens needs
    beside the parts before: the newest page, windows (`first_pages`: as `PageTable.first_page`),
    the value and the ring of fixed tensors.
    """

    begin: int
    end: int
    pages: Mapping[TableKey, Mapping[int, int]]
    whole: bool
    first_pages: Mapping[TableKey, int]
    value: State | None = None
    ring: State | None = None


def keep(store: StateStore, sequence: int, begin: int, end: int, *, whole: bool) -> Kept:
    """Hold tokens begin..end of a sequence.

    Raises UserError unless it holds them, and for a whole part unless it ends there: values of
    earlier lengths are gone.
    """
    length = store.length(sequence)
    if not 0 <= begin <= end <= length or (whole and end != length):
        raise UserError(
            f"tokens {begin} to {end} of a sequence of {length} cannot be kept"
            + (" as a whole part, which ends where the sequence does" if whole else "")
        )
    pages, first_pages = {}, {}
    for key, table in store.tables.items():
        if key.window is None:
            size, last = table.page_size, table.rows(end)
            full = range(table.rows(begin) // size, ceil(last / size) if whole else last // size)
            pages[key] = table.keep(sequence, full)
        elif whole:
            pages[key] = table.keep(sequence, table.tables[sequence])
            first_pages[key] = table.first_page[sequence]
    value = ring = None
    if whole and store.slots is not None:
        value = store.slots.keep(sequence)
    if whole and store.rings is not None:
        ring = store.rings.keep(sequence)
    return Kept(begin, end, pages, whole, first_pages, value, ring)


def forget(store: StateStore, part: Kept) -> None:
    """Let go of a part, once."""
    for key, pages in part.pages.items():
        store.tables[key].forget(pages)
    if part.value is not None and store.slots is not None:
        store.slots.forget(part.value)
    if part.ring is not None and store.rings is not None:
        store.rings.forget(part.ring)


def share(store: StateStore, sequence: int, part: Kept) -> None:
    """Let a sequence that has computed a part itself hold the part's pages instead of its own.

    Raises UserError for one that is not open.
    """
    store.length(sequence)
    for key, pages in part.pages.items():
        store.tables[key].share(sequence, pages)


def resume(store: StateStore, parts: Sequence[Kept]) -> int:
    """Open a sequence whose past is that of parts, one after the other; nothing is copied.

    It cannot be rolled back behind their end where there are windows or fixed tensors. Raises
    UserError for parts that leave a gap and where the last one is not whole but must be, and
    StoreFullError.
    """
    ends = [0, *(p.end for p in parts)]
    if any(part.begin != end for part, end in zip(parts, ends, strict=False)):
        spans = [(p.begin, p.end) for p in parts]
        raise UserError(f"parts of tokens {spans} do not follow one another from 0 on")
    last = parts[-1] if parts else None
    if last is not None and not last.whole:
        begun = (table.rows(last.end) % table.page_size for table in store.tables.values())
        if store.bounded or any(begun):
            raise UserError(
                f"a sequence cannot go on from token {last.end}: what it needs beside full pages "
                "was not kept there; end with a whole part"
            )
    sequence = store.add()
    if last is None:
        return sequence
    for key, table in store.tables.items():
        pages = {page: held for p in parts for page, held in p.pages.get(key, {}).items()}
        if key.window is not None:
            pages = dict(last.pages[key])
        table.adopt(sequence, pages, last.first_pages.get(key))
    if last.value is not None and store.slots is not None:
        store.slots.adopt(sequence, last.value)
    if last.ring is not None and store.rings is not None:
        store.rings.adopt(sequence, last.ring)
    store.lengths[sequence] = last.end
    store.oldest[sequence] = last.end if store.bounded else 0
    return sequence
