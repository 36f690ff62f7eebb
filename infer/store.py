"""One store for the state of all architectures, always paged.

Row tensors live in pages behind block tables, one table for each (every, window, sinks); fixed
tensors live in slots. Pages and slots are reference-counted: a fork shares both and copies what it
writes to. With `lookback` > 0 the newest tokens can be rolled back: windows keep that many rows
more, and every value of a fixed tensor has a slot of its own.

Rows of one plane (a head of K, say) lie together: a pool is [*planes, pages * page_size, row].
The loop owns lengths: `begin` opens a step, `commit` advances it. A step is all or nothing: where
it fails, `abort` undoes it, and a sequence whose state was overwritten by then is lost, which every
later use of it says.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush

import torch
from torch import Tensor

from archs.errors import UserError
from archs.spec import RECURRENT_LIMIT, Replay, StateSpec, require_replay
from infer.books import OnDevice
from infer.memory import require_memory
from infer.pages import PageTable, StoreFullError, TableKey
from infer.plan import StepPlan
from infer.pools import Pools, decoded, decoded_rows, key_of, pool_bytes
from infer.rings import RingTable
from infer.slots import SlotTable
from infer.synthetic import synthesise


class StateStore:
    """State of up to `max_sequences` sequences of up to `max_context` tokens.

    specs:    one StateSpec per layer.
    pages:    pages of every table, or of some by their keys; default: enough for all sequences at
              full length.
    lookback: tokens that `rollback` can take back from windowed and fixed state.
    kept:     values of fixed tensors beside those of sequences that may be held (`infer.kept`).
    replay:   inputs in a ring from which values that declare them are computed anew; 0: every value
              in reach is kept as a copy. Other values are kept as copies in any case.
    kernels:  whether kernels read and write the state where it lies.
    Raises UserError when the pools cannot fit in the memory that is free, and for a tensor that no
    store can hold yet.
    """

    def __init__(
        self,
        specs: Sequence[StateSpec],
        *,
        max_sequences: int,
        max_context: int,
        page_size: int = 64,
        lookback: int = 0,
        replay: int = 0,
        kept: int = 0,
        pages: int | Mapping[TableKey, int] | None = None,
        device: torch.device | str = "cpu",
        kernels: bool = False,
    ) -> None:
        if max_sequences < 1 or max_context < 1 or page_size < 1 or lookback < 0:
            raise UserError(
                f"max_sequences={max_sequences}, max_context={max_context}, "
                f"page_size={page_size} must be at least 1 and lookback={lookback} at least 0"
            )
        require_replay(replay, lookback)
        self.specs = list(specs)
        self.max_context = max_context
        self.page_size = page_size
        self.lookback = lookback
        self.replay = replay
        self.device = torch.device(device)
        self.kernels = kernels
        self.lengths = [0] * max_sequences
        self.oldest = [0] * max_sequences
        #: A heap: the lowest sequence is opened first, so that batches are adjacent.
        self._free = list(range(max_sequences))
        self._open = [False] * max_sequences
        #: Sequences whose state a failed step has overwritten.
        self._lost: set[int] = set()
        self._step: StepPlan | None = None
        owned = [t for s in self.specs for t in s.owned]
        limits = dict.fromkeys(map(key_of, owned), pages) if isinstance(pages, int) else pages or {}
        require_memory(
            pool_bytes(
                self.specs, limits, sequences=max_sequences, kept=kept, max_context=max_context,
                page_size=page_size, lookback=lookback, replay=replay,
            ),
            self.device, f"the state of {max_sequences} sequences of {max_context} tokens",
        )  # fmt: skip
        self.tables: dict[TableKey, PageTable] = {}
        for tensor in owned:
            key = key_of(tensor)
            if key not in self.tables:
                self.tables[key] = PageTable(
                    key, sequences=max_sequences, max_rows=max(1, tensor.rows(max_context)),
                    page_size=page_size, lookback=tensor.kept_back(lookback), pages=limits.get(key),
                )  # fmt: skip
        self.slots: SlotTable | None = None
        self.rings: RingTable | None = None
        replayed = [spec.replayed(replay) for spec in self.specs]
        if any(replayed):
            self.rings = RingTable(
                sequences=max_sequences, replay=Replay(replay, lookback), spare=kept
            )
        if any(len(s.fixed) > len(r) for s, r in zip(self.specs, replayed, strict=True)):
            self.slots = SlotTable(sequences=max_sequences, lookback=lookback, spare=kept)
        #: The tables of fixed tensors.
        self._values = [table for table in (self.slots, self.rings) if table is not None]
        #: Whether what is remembered of a token may be gone after later ones.
        self.bounded = bool(self._values) or any(k.window is not None for k in self.tables)
        self.pools = Pools(self.specs, self.tables, self.slots, self.rings, self.device, kernels)
        self.on_device = OnDevice(self.tables, max_sequences, max_context, self.device)
        self.peak_bytes = 0

    # -- sequences ---------------------------------------------------------------------------

    @contextmanager
    def sequences(self, count: int) -> Iterator[list[int]]:
        """Open `count` empty sequences, all or none; what is left in the list closes at the end.

        Whoever releases one earlier takes it out of the list. Raises StoreFullError.
        """
        if count > len(self._free):
            raise StoreFullError(
                f"{count} sequences do not fit beside those that are open: {len(self._free)} of "
                f"{len(self.lengths)} are free; release some, or open a store with a larger "
                "max_sequences"
            )
        opened: list[int] = []
        try:
            for _ in range(count):
                opened.append(self.add())
            yield opened
        finally:
            for sequence in opened:
                self.release(sequence)

    def add(self) -> int:
        """Open an empty sequence and return its number. Raises StoreFullError."""
        if not self._free:
            raise StoreFullError(f"all {len(self.lengths)} sequences are in use; release one")
        sequence = heappop(self._free)
        for values in self._values:
            values.open(sequence)
        self.lengths[sequence] = self.oldest[sequence] = 0
        self._open[sequence] = True
        return sequence

    def release(self, sequence: int) -> None:
        """Close a sequence, a lost one too; what no fork holds becomes free."""
        self._require_open(sequence, lost=True)
        for table in self.tables.values():
            table.release(sequence)
        for values in self._values:
            values.release(sequence)
        self._lost.discard(sequence)
        self._open[sequence] = False
        heappush(self._free, sequence)

    def fork(self, sequence: int) -> int:
        """A second sequence with the same past: pages and slots are shared, nothing is copied."""
        self._require_open(sequence)
        child = self.add()
        for table in self.tables.values():
            table.fork(sequence, child)
        for values in self._values:
            values.fork(sequence, child)
        self.lengths[child], self.oldest[child] = self.lengths[sequence], self.oldest[sequence]
        return child

    def length(self, sequence: int) -> int:
        """Tokens of an open sequence that is in no open step."""
        self._require_open(sequence)
        return self.lengths[sequence]

    def reach(self, new_tokens: int) -> int:
        """How many tokens `rollback` can take back after a step of `new_tokens`, at least."""
        if not self.bounded:
            return self.max_context
        if self.rings is not None and new_tokens > self.lookback + 1:
            # It may find no room for its inputs, and takes all that is held into the value.
            return 0
        return self.lookback if new_tokens <= RECURRENT_LIMIT else 0

    def rollback(self, sequence: int, tokens: int) -> None:
        """Forget the newest `tokens` tokens of a sequence, as if they had never been.

        Raises UserError where the state no longer reaches back that far.
        """
        self._require_open(sequence)
        end = self.lengths[sequence]
        length = end - tokens
        oldest = self.oldest[sequence] if self.bounded else 0
        if tokens < 0 or length < oldest:
            raise UserError(
                f"rollback of {tokens} tokens at length {end} reaches before {oldest}; open the "
                f"store with a larger lookback (now {self.lookback})"
            )
        for table in self.tables.values():
            table.truncate(sequence, table.rows(length), table.rows(end))
        for values in self._values:
            values.truncate(sequence, length)
        self.lengths[sequence] = length

    # -- steps -------------------------------------------------------------------------------

    @contextmanager
    def step(
        self, sequences: Sequence[int], new_tokens: int, new: Tensor | None = None
    ) -> Iterator[StepPlan]:
        """A step from `begin` that ends in `commit`, or in `abort` where anything fails."""
        self._require_idle()
        try:
            step = self.begin(sequences, new_tokens, new)
            yield step
            self.commit(step)
        except BaseException:
            self.abort()
            raise

    def begin(
        self, sequences: Sequence[int], new_tokens: int, new: Tensor | None = None
    ) -> StepPlan:
        """Open a step of `new_tokens` tokens per sequence (`new` [B] of them valid).

        Raises UserError beyond max_context, for a sequence named twice and while another step is
        open, and StoreFullError without pages; the store then is as it was.
        """
        self._require_idle()
        counts = [new_tokens] * len(sequences) if new is None else [int(n) for n in new.tolist()]
        if not sequences or new_tokens < 1 or len(counts) != len(sequences):
            raise UserError(
                f"a step of {new_tokens} tokens for sequences {list(sequences)} and new={counts} "
                "needs at least one of each, and one count per sequence"
            )
        for count in counts:
            if not 0 <= count <= new_tokens:
                raise UserError(f"new={count} must lie between 0 and {new_tokens}")
        self.check_context(sequences, counts)
        self._step = StepPlan(self, list(sequences), new_tokens, counts)
        try:
            self._step.reserve()
        except BaseException:
            self.abort()
            raise
        self._note_peak()
        return self._step

    def check_context(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        """Raise UserError unless distinct open sequences can all take `counts` more tokens."""
        for sequence, count in zip(sequences, counts, strict=True):
            self._require_open(sequence)
            if self.lengths[sequence] + count > self.max_context:
                raise UserError(
                    f"context {self.lengths[sequence] + count} exceeds max_context="
                    f"{self.max_context}; open the store with a larger max_context"
                )
        if len(set(sequences)) != len(sequences):
            raise UserError(
                f"sequences {list(sequences)} name one twice in a step; name each once, or fork it"
            )

    def commit(self, step: StepPlan) -> None:
        """Advance the lengths of a step's sequences, free what left a window, close the step.

        Raises UserError for a step that is not open.
        """
        if step is not self._step:
            raise UserError("this step is not the open one; commit a step once, after its `begin`")
        step.committed = True
        reach = 0 if step.rings is not None and step.rings.whole else self.reach(step.new_tokens)
        for sequence, length, count in zip(step.sequences, step.lengths, step.counts, strict=True):
            end = self.lengths[sequence] = length + count
            for table in self.tables.values():
                table.settle(sequence, table.rows(end))
            if count:
                self.oldest[sequence] = max(self.oldest[sequence], end - reach)
        if self.slots is not None:
            self.slots.settle(step.slots)
        if self.rings is not None and step.rings is not None:
            self.rings.settle(step.rings)
        self._step = None
        step.close()

    def abort(self) -> None:
        """Undo the open step, if there is one: lengths, pages and fixed tensors are as before it.

        Where the step has overwritten state of which there is no copy (recurrent state without
        lookback; a window's rows in a step longer than its ring), the sequence is lost.
        """
        step = self._step
        if step is None:
            return
        if step.committed:
            # Interrupted in `commit`: every layer has run, so the step is finished instead.
            self.commit(step)
            return
        self._lost |= self._undo(step)
        self._step = None
        step.close()

    def _undo(self, step: StepPlan) -> set[int]:
        """Bring a step's sequences back to where they were; returns those that cannot be.

        What a rollback can reach shrinks by what was overwritten. A window's rows, and values
        without lookback, are overwritten in place: a copy before every step would cost as much as
        the step's own writes.
        """
        lost = set()
        for part in step.tables.values():
            lengths = dict(zip(step.sequences, part.lengths, strict=True))
            lost |= part.table.undo(part.change, lengths, written=step.wrote_rows)
        if self.slots is not None:
            lost |= self.slots.undo(step.slots, written=step.wrote_fixed)
        if self.rings is not None and step.rings is not None:
            lost |= self.rings.undo(step.rings, written=step.wrote_fixed)
        for sequence in step.sequences:
            reach = [t.every * t.reach(sequence) for t in self.tables.values()]
            reach += [values.oldest(sequence) for values in self._values]
            self.oldest[sequence] = max(self.oldest[sequence], *reach, 0)
        return lost

    def fill(self, sequences: Sequence[int], length: int) -> None:
        """Give sequences `length` more tokens of synthetic state, for timing steps at that context.

        Touches no other sequence; no part of it can be rolled back. Raises as `begin`.
        """
        if length:
            with self.step(sequences, length) as step:
                synthesise(step)
            for sequence in sequences:
                self.oldest[sequence] = self.lengths[sequence]

    def snapshot(self, sequence: int) -> list[dict[str, Tensor]]:
        """What each layer remembers of a sequence: copies of its visible rows and its values.

        Rows come as [*planes, rows, row], oldest first, sinks apart; a value that is replayed as
        the one that is kept.
        """
        self._require_open(sequence)
        held = []
        for layer in self.pools.layers:
            found: dict[str, Tensor] = {}
            for name, value in layer.fixed.items():
                table = self.rings if name in layer.inputs else self.slots
                assert table is not None
                found[name] = decoded(layer, name, value[table.current(sequence)])
            for name, (key, _, _) in layer.rows.items():
                pages = self.tables[key]
                length, first = pages.rows(self.lengths[sequence]), 0
                if pages.window is not None:
                    first = max(length - pages.window, pages.oldest_row(sequence))
                at = torch.tensor(pages.places(sequence, range(first, length)), dtype=torch.int64)
                found[name] = decoded_rows(layer, name, at.to(self.device))
            held.append(found)
        return held

    # -- accounting --------------------------------------------------------------------------

    def declared_bytes(self, length: int) -> int:
        """What the specs declare for one sequence of `length` tokens, in whole pages."""
        return sum(
            s.state_bytes(
                length, page_size=self.page_size, lookback=self.lookback, replay=self.replay
            )
            for s in self.specs
        )

    @property
    def allocated_bytes(self) -> int:
        """Bytes of pages and slots that open sequences hold."""
        paged = sum(table.used * self.pools.page_bytes[key] for key, table in self.tables.items())
        slots = 0 if self.slots is None else self.slots.used * self.pools.slot_bytes
        return (
            paged + slots + (0 if self.rings is None else self.rings.used * self.pools.ring_bytes)
        )

    # -- inside ------------------------------------------------------------------------------

    def _note_peak(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def _require_open(self, sequence: int, *, lost: bool = False) -> None:
        """Raise unless a sequence is open and in no open step; lost: one that was lost will do."""
        if not 0 <= sequence < len(self.lengths) or not self._open[sequence]:
            raise UserError(f"sequence {sequence} is not open; `add` or `fork` one first")
        if self._step is not None and sequence in self._step.sequences:
            self._require_idle()
        if sequence in self._lost and not lost:
            raise UserError(
                f"sequence {sequence} was lost in a step that failed; release it and start it anew"
            )

    def _require_idle(self) -> None:
        if self._step is not None:
            raise UserError(
                f"a step of sequences {self._step.sequences} is open; commit or abort it first"
            )
