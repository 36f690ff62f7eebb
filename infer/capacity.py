"""How many sequences and pages a given memory holds, for any architecture.

What a sequence holds whatever its length (recurrent states) is set aside for as many sequences as
may run at once; the rest of the memory becomes pages, shared by all of them. A window's table takes
no more pages than the window is long.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from archs.checks import at_least, require_at_least
from archs.errors import UserError
from archs.spec import StateSpec
from infer.memory import DoesNotFitError
from infer.pages import TableKey
from infer.pools import key_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What a server may hand out.

    max_sequences: that run at once. pages: of each block table, shared. slots: of fixed tensors,
    for those that run and for what is kept of prefixes; 0: there are no such tensors. lookback:
    tokens that a sequence can take back. page_bytes, slot_bytes: of one page and one value, where
    anybody asks.
    """

    max_sequences: int
    max_context: int
    page_size: int
    pages: Mapping[TableKey, int] = field(default_factory=dict)
    slots: int = 0
    lookback: int = 0
    page_bytes: Mapping[TableKey, int] = field(default_factory=dict)
    slot_bytes: int = 0
    #: Of each table: tokens of a row, and the most pages that one sequence holds.
    _spans: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        at_least(self, 1, "max_sequences", "max_context", "page_size")
        if 0 < self.slots < self.max_sequences:
            raise UserError(
                f"slots={self.slots} are less than one for each of max_sequences="
                f"{self.max_sequences}; give more, or 0 where no tensor needs one"
            )
        at_least(self, 0, "lookback")
        spans = [
            (k.every, most_pages(k, self.max_context, self.page_size, self.lookback))
            for k in self.pages
        ]
        object.__setattr__(self, "_spans", tuple(spans))

    @classmethod
    def of(
        cls, specs: Sequence[StateSpec], *, max_sequences: int, max_context: int, page_size: int,
        memory_bytes: float | None = None, typical_tokens: int = 0, checkpoints: int = 0,
        lookback: int = 0,
    ) -> "Capacity":  # fmt: skip
        """What fits into `memory_bytes` of state (None: all sequences at full length).

        checkpoints: of prefixes: slots and windows are provided for them beside those of sequences.
        lookback: tokens that a sequence can take back, of which it keeps all values.
        typical_tokens: of a sequence on average: pages are dealt out to the tables as sequences of
        this length take them, and where sequences hold a state, too, no more of them are provided
        for than fit: more would leave no pages to them.
        Raises DoesNotFitError where not one sequence of one page fits.
        """
        require_at_least("max_sequences", max_sequences, 1)
        require_at_least("max_context", max_context, 1)
        require_at_least("checkpoints", checkpoints, 0)
        page_bytes: dict[TableKey, int] = {}
        for tensor in (t for s in specs for t in s.owned):
            key = key_of(tensor)
            page_bytes[key] = page_bytes.get(key, 0) + page_size * tensor.nbytes
        most = {key: most_pages(key, max_context, page_size, lookback) for key in page_bytes}
        sequences = max_sequences
        fixed_bytes = sum(s.fixed_bytes for s in specs)
        kept_bytes = (lookback + 1) * fixed_bytes
        if memory_bytes is not None:
            first = kept_bytes + sum(page_bytes.values())
            # Beside those of sequences: a page of padding a table, slots of zeros and of padding.
            beside = sum(page_bytes.values()) + (2 + checkpoints) * fixed_bytes
            left = memory_bytes - beside
            if left < first:
                raise DoesNotFitError(
                    f"memory_bytes={memory_bytes:.4g} do not hold one sequence of {page_size} "
                    f"tokens, which takes {first + beside:.4g} bytes with padding and checkpoints="
                    f"{checkpoints}; give more memory, or take fewer of these or a smaller "
                    "page_size"
                )
            length = max(page_size, min(typical_tokens, max_context))
            typical = {
                key: max(1, min(count, -(-(length // key.every) // page_size)))
                for key, count in most.items()
            }
            if fixed_bytes:
                each = kept_bytes + sum(typical[key] * page_bytes[key] for key in typical)
                sequences = max(1, min(sequences, int(left // each)))
            left -= sequences * kept_bytes
        full = {
            key: (sequences + (checkpoints if key.window is not None else 0)) * count
            for key, count in most.items()
        }
        pages = full if memory_bytes is None else _dealt(left, page_bytes, typical, full)
        return cls(
            max_sequences=sequences, max_context=max_context, page_size=page_size, pages=pages,
            slots=sequences + checkpoints if fixed_bytes else 0, lookback=lookback,
            page_bytes=page_bytes, slot_bytes=fixed_bytes,
        )  # fmt: skip

    @property
    def checkpoints(self) -> int:
        """Slots beside those of sequences."""
        return max(0, self.slots - self.max_sequences)

    @property
    def only_rows(self) -> bool:
        """Whether a sequence can go on from any full page: nothing else is remembered."""
        return not self.slots and all(k.window is None and k.every == 1 for k in self.pages)

    def pages_of(self, tokens: int) -> tuple[int, ...]:
        """Pages of each table that a sequence of so many tokens holds, at most."""
        size = self.page_size
        return tuple([min(most, -(-(tokens // every) // size)) for every, most in self._spans])

    def full_pages(self, begin: int, end: int) -> tuple[int, ...]:
        """Pages of each table that become full in tokens begin..end; none of windows."""
        size = self.page_size
        return tuple(
            [
                0
                if key.window is not None
                else end // key.every // size - begin // key.every // size
                for key in self.pages
            ]
        )

    def newest_pages(self, tokens: int) -> tuple[int, ...]:
        """Pages of each table that a sequence of so many tokens has begun; none of windows."""
        size = self.page_size
        return tuple([int(k.window is None and tokens // k.every % size > 0) for k in self.pages])

    def window_pages(self, key: TableKey, tokens: int) -> list[int]:
        """Logical pages of a window's table that a sequence of so many tokens keeps."""
        assert key.window is not None
        rows, size = tokens // key.every, self.page_size
        end, sunk = -(-rows // size), -(-key.sinks // size)
        first = (rows - key.window - max(0, _kept_back(key, self.lookback) - 1)) // size
        return [*range(min(sunk, end)), *range(max(sunk, first), end)]

    def bytes_of(self, counts: Sequence[float]) -> float:
        """Bytes of so many pages of each table and, last, slots."""
        pages = sum(
            count * self.page_bytes[key] for key, count in zip(self.pages, counts, strict=False)
        )
        return pages + counts[-1] * self.slot_bytes

    def room_of(self, pages: Sequence[int]) -> int:
        """Tokens of a sequence that fit into so many pages of each table."""
        rooms = [
            (count * self.page_size + 1) * every - 1
            for (every, most), count in zip(self._spans, pages, strict=True)
            if count < most
        ]
        return min(rooms, default=self.max_context)

    def require_fit(self, tokens: int) -> None:
        """Raise UserError where not even a sequence alone can hold so many tokens."""
        if tokens > self.max_context:
            raise UserError(
                f"a request of {tokens} tokens, prompt and answer, exceeds max_context="
                f"{self.max_context}; ask for fewer, or serve with a larger max_context"
            )
        for (key, there), wanted in zip(self.pages.items(), self.pages_of(tokens), strict=True):
            if wanted > there:
                raise UserError(
                    f"a request of {tokens} tokens, prompt and answer, takes {wanted} pages of "
                    f"{self.page_size * key.every} tokens and the memory holds {there}; ask for "
                    "fewer, or give the server more memory"
                )


def most_pages(key: TableKey, max_context: int, page_size: int, lookback: int = 0) -> int:
    """Pages of a table that one sequence holds at most, of which tokens can be taken back."""
    full = -(-max(1, max_context // key.every) // page_size)
    if key.window is None:
        return full
    # A ring may begin in the middle of a page (`infer.pages.PageTable`).
    ring = -(-(key.window - 1 + _kept_back(key, lookback)) // page_size) + 1
    return min(full, -(-key.sinks // page_size) + ring)


def _kept_back(key: TableKey, lookback: int) -> int:
    """As `archs.spec.RowSpec.kept_back`."""
    return -(-lookback // key.every)


def _dealt(
    left_bytes: float, page_bytes: Mapping[TableKey, int], typical: Mapping[TableKey, int],
    full: Mapping[TableKey, int],
) -> dict[TableKey, int]:  # fmt: skip
    """Pages of each table, as sequences take them; what a table cannot use goes to the others."""
    pages = dict.fromkeys(full, 1)
    left = left_bytes - sum(page_bytes.values())
    wanting = [key for key in full if full[key] > 1]
    while wanting:
        share = left / sum(typical[key] * page_bytes[key] for key in wanting)
        filled = [key for key in wanting if 1 + share * typical[key] >= full[key]]
        for key in filled or wanting:
            pages[key] = full[key] if filled else 1 + int(share * typical[key])
            left -= (pages[key] - 1) * page_bytes[key]
        wanting = [key for key in wanting if key not in filled] if filled else []
    return pages
