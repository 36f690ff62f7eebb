"""How many sequences and pages a given memory holds, for any architecture.

What a sequence holds whatever its length (recurrent states, windows) is set aside for as many
sequences as may run at once; the rest of the memory becomes pages of the tables that grow with the
context, shared by all of them.
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

    max_sequences: that run at once. pages: of each table that grows with the context, shared.
    """

    max_sequences: int
    max_context: int
    page_size: int
    pages: Mapping[TableKey, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, 1, "max_sequences", "max_context", "page_size")

    @classmethod
    def of(
        cls, specs: Sequence[StateSpec], *, max_sequences: int, max_context: int, page_size: int,
        memory_bytes: float | None = None, typical_tokens: int = 0,
    ) -> "Capacity":  # fmt: skip
        """What fits into `memory_bytes` of state (None: all sequences at full length).

        typical_tokens: of a sequence on average. Where sequences hold state of a fixed size, no
        more of them are provided for than fit at this length: more would leave no pages to them.
        Raises DoesNotFitError where not one sequence of one page fits.
        """
        require_at_least("max_sequences", max_sequences, 1)
        require_at_least("max_context", max_context, 1)
        growing = [t for s in specs for t in s.owned if t.window is None]
        page_bytes = dict.fromkeys(map(key_of, growing), 0)
        for tensor in growing:
            page_bytes[key_of(tensor)] += page_size * tensor.nbytes
        full = {
            key: -(-max(1, max_context // key.every) // page_size) * max_sequences
            for key in page_bytes
        }
        if memory_bytes is None:
            return cls(
                max_sequences=max_sequences, max_context=max_context, page_size=page_size,
                pages=full,
            )  # fmt: skip
        fixed_bytes = constant_bytes(specs, max_context, page_size)
        # Beside those of sequences: a page of padding in every table, slots of zeros and padding.
        slot_bytes = sum(s.fixed_bytes for s in specs)
        row_bytes = sum(t.nbytes for s in specs for t in s.owned)
        left = memory_bytes - 2 * slot_bytes - page_size * row_bytes
        least = fixed_bytes + sum(page_bytes.values())
        if left < least:
            raise DoesNotFitError(
                f"memory_bytes={memory_bytes:.4g} do not hold one sequence of {page_size} tokens, "
                f"which takes {least + memory_bytes - left:.4g} bytes with padding; give more "
                "memory, or take a smaller page_size"
            )
        slope = sum(bytes_ / (key.every * page_size) for key, bytes_ in page_bytes.items())
        sequences = max_sequences
        if fixed_bytes:
            typical = max(page_size, min(typical_tokens, max_context)) * slope
            sequences = max(1, min(sequences, int(left // (fixed_bytes + typical))))
        tokens = (left - sequences * fixed_bytes) / slope if slope else 0
        pages = {
            key: max(1, min(full[key], int(tokens // (key.every * page_size))))
            for key in page_bytes
        }
        return cls(
            max_sequences=sequences, max_context=max_context, page_size=page_size, pages=pages
        )

    def pages_of(self, tokens: int) -> tuple[int, ...]:
        """Pages of each table that a sequence of so many tokens holds."""
        size = self.page_size
        return tuple(-(-(tokens // key.every) // size) for key in self.pages)

    def room_of(self, pages: Sequence[int]) -> int:
        """Tokens of a sequence that fit into so many pages of each table."""
        rooms = [
            (count * self.page_size + 1) * key.every - 1
            for key, count in zip(self.pages, pages, strict=True)
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


def constant_bytes(specs: Sequence[StateSpec], max_context: int, page_size: int) -> int:
    """Bytes that a sequence holds, or may come to hold, whatever its length: states and windows."""
    held = sum(s.fixed_bytes for s in specs)
    for tensor in (t for s in specs for t in s.owned):
        if tensor.window is None:
            continue
        # A ring may begin in the middle of a page (`infer.pages.PageTable`).
        window = -(-(tensor.window - 1) // page_size) + 1 + -(-tensor.sinks // page_size)
        pages = min(window, -(-tensor.rows(max_context) // page_size))
        held += pages * page_size * tensor.nbytes
    return held
