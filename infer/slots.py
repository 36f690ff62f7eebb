"""Which slot holds which value of the fixed tensors: one slot per sequence and length in reach.

All fixed tensors of all layers share the numbering. Without lookback a sequence has one slot that
steps update in place. With it every token's value goes into a slot of its own, so that a rollback
forgets slots and nothing is copied. A fork holds its source's slots once more; a value that
several sequences hold is never written to.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from archs.spec import RECURRENT_LIMIT, kept_states
from infer.counted import Counted
from infer.pages import StoreFullError

FULL = (
    "all slots are in use: kept parts of pasts hold some beside those of sequences; forget one, or "
    "open the store with more than kept={}"
)
#: The slot of zeros, which every empty sequence reads; nobody writes to it.
ZERO = 0


class State(NamedTuple):
    """Where the value after `length` tokens lies."""

    length: int
    slot: int


@dataclass(slots=True)
class Moved:
    """A sequence's part of a step.

    before: what it held. stay: those of them that stay in reach. written: the step's own values.
    taken: slots of theirs that were free; reused: whose older value they overwrite.
    parted: what it no longer holds from the step's begin; late: from its end.
    """

    before: Sequence[State]
    stay: Sequence[State] = ()
    written: Sequence[State] = ()
    taken: Sequence[int] = ()
    reused: Collection[int] = ()
    parted: Sequence[State] = ()
    late: Sequence[State] = ()


@dataclass(slots=True)
class SlotChange:
    """What a step does to the fixed tensors of its sequences.

    read, write, last: as in `archs.state.Slots`, a list for each sequence.
    copies: (source, target) slots to copy before any layer runs.
    """

    read: list[int] = field(default_factory=list)
    write: list[list[int]] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    moved: dict[int, Moved] = field(default_factory=dict)


class SlotTable:
    """Slots of up to `sequences` sequences that can be taken back by `lookback` tokens.

    There are `count` slots: that of zeros, one for each sequence and length in reach, `spare` ones
    for what is kept, and one that padding may write to.
    """

    def __init__(self, *, sequences: int, lookback: int, spare: int = 0) -> None:
        self.lookback = lookback
        self.spare = spare
        self.share = lookback + 1
        self.count = sequences * self.share + spare + 2
        self.padding = self.count - 1
        self._slots = Counted(sequences * self.share + spare, first=ZERO + 1)
        self.states: list[list[State]] = [[] for _ in range(sequences)]

    @property
    def used(self) -> int:
        """Slots that some sequence holds."""
        return self._slots.used

    @property
    def refs(self) -> list[int]:
        """How many sequences hold each slot."""
        return self._slots.refs

    def current(self, sequence: int) -> int:
        """The slot of a sequence's newest value."""
        states = self.states[sequence]
        return states[-1].slot if states else ZERO

    def oldest(self, sequence: int) -> int:
        """The shortest length that a sequence can be taken back to."""
        states = self.states[sequence]
        return states[0].length if states else 0

    def open(self, sequence: int) -> None:
        """An empty sequence."""
        self.states[sequence] = [State(0, ZERO)]

    def release(self, sequence: int) -> None:
        """Give all slots of a sequence back."""
        self._drop(self.states[sequence])
        self.states[sequence] = []

    def fork(self, source: int, target: int) -> None:
        """Let `target` share all slots of `source`."""
        self.states[target] = list(self.states[source])
        self._hold(self.states[target])

    def keep(self, sequence: int) -> State:
        """Hold a sequence's newest value once more, for nobody."""
        state = self.states[sequence][-1]
        self._hold([state])
        return state

    def forget(self, state: State) -> None:
        """Let go of a value from `keep`, once."""
        self._drop([state])

    def adopt(self, sequence: int, state: State) -> None:
        """Let an empty sequence share a value from `keep`."""
        self._hold([state])
        self.states[sequence] = [state]

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the values after more than `length` tokens, which must be in reach."""
        states = self.states[sequence]
        kept = [s for s in states if s.length <= length]
        self._drop(states[len(kept) :])
        self.states[sequence] = kept

    def reserve(self, sequence: int, length: int, new: int, step: int, change: SlotChange) -> None:
        """Find slots for the values after `new` of a step's `step` tokens; adds to `change`.

        Raises StoreFullError; nothing of this sequence has changed then.
        """
        held, write = self.states[sequence], [-1] * step
        change.write.append(write)
        if new == 0:
            change.read.append(held[-1].slot)
            change.last.append(self.padding)
            return
        slot = held[-1].slot
        if self.lookback:
            moved = self._beside(held, length + new, new, step)
        elif self._is_own(slot):
            # Nearly every sequence of every step: nothing moves.
            write[new - 1] = slot
            change.read.append(slot)
            change.last.append(slot)
            self.states[sequence] = written = [State(length + new, slot)]
            change.moved[sequence] = Moved(held, written=written, reused=(slot,))
            return
        else:
            moved = self._apart(sequence, held, length + new)
        read, last = held[-1], moved.written[-1].slot
        if read in moved.parted:
            # Somebody else may write to what is parted with: it is read where it is copied to.
            change.copies.append((read.slot, last))
            change.read.append(last)
        else:
            change.read.append(read.slot)
        for length_then, slot in moved.written:
            write[length_then - length - 1] = slot
        change.last.append(last)
        change.moved[sequence] = moved
        self.states[sequence] = [*moved.stay, *moved.written]

    def _apart(self, sequence: int, held: list[State], end: int) -> Moved:
        """A slot of its own for what it shares, or for its first value."""
        self._require_free(1)
        self._drop(held)
        fresh = self._take(ZERO + 1 + sequence)
        return Moved(held, written=(State(end, fresh),), taken=(fresh,), parted=held)

    def _beside(self, held: list[State], end: int, new: int, step: int) -> Moved:
        """Values beside those that stay in reach; what falls out of it makes room."""
        kept = min(new, kept_states(step, self.lookback))
        stay: list[State] = []
        if step <= RECURRENT_LIMIT:
            stay = [s for s in held if s.length >= end - self.lookback]
        room: list[State] = []
        parted: list[State] = []
        late: list[State] = []
        for state in held[: len(held) - len(stay)]:
            if state == held[-1] and (kept < self.share or state.slot == ZERO):
                late.append(state)
            elif self._is_own(state.slot):
                room.append(state)
            else:
                parted.append(state)
        self._require_free(kept - len(room))
        # What the step reads gives way to its last value alone.
        read = room.pop() if room and room[-1] == held[-1] else None
        parted += room[kept:]
        self._drop(parted)
        written: list[State] = []
        taken: list[int] = []
        for at, length in enumerate(range(end - kept + 1, end + 1)):
            if read is not None and length == end:
                slot = read.slot
            elif at < len(room):
                slot = room[at].slot
            else:
                slot = self._take(ZERO + 1)
                taken.append(slot)
            written.append(State(length, slot))
        reused = {s.slot for s in written}.difference(taken)
        return Moved(held, stay, written, taken, reused, parted, late)

    def _is_own(self, slot: int) -> bool:
        """Whether one sequence alone holds a slot."""
        return slot != ZERO and self._slots.refs[slot] == 1

    def settle(self, change: SlotChange) -> None:
        """The step is done: values that it read and that fell out of reach go."""
        if self.lookback:
            for moved in change.moved.values():
                self._drop(moved.late)

    def undo(self, change: SlotChange, *, written: bool) -> set[int]:
        """Take back what a step did; returns the sequences whose value it has overwritten.

        written: whether values may have been written.
        """
        lost, spoilt = set(), set[int]()
        for moved in change.moved.values():
            for slot in moved.taken:
                self._slots.drop(slot)
            if written:
                spoilt.update(moved.reused, moved.taken)
        for sequence, moved in change.moved.items():
            kept: list[State] = []
            for state in moved.before:
                # Behind a value that is gone no earlier one is in reach.
                kept = [] if state.slot in spoilt else [*kept, state]
            self._hold([s for s in kept if s in moved.parted])
            self._drop([s for s in moved.before if s not in kept and s not in moved.parted])
            if not kept:
                lost.add(sequence)
            self.states[sequence] = kept or [State(0, ZERO)]
        return lost

    def _hold(self, states: Sequence[State]) -> None:
        for state in states:
            if state.slot != ZERO:
                self._slots.hold(state.slot)

    def _take(self, wanted: int) -> int:
        slot = self._slots.take(wanted)
        assert slot is not None
        return slot

    def _require_free(self, wanted: int) -> None:
        """Raise StoreFullError unless so many slots are free."""
        if self._slots.free < wanted:
            raise StoreFullError(FULL.format(self.spare))

    def _drop(self, states: Sequence[State]) -> None:
        for state in states:
            if state.slot != ZERO:
                self._slots.drop(state.slot)
