"""Which slot holds a sequence's replayed values and the ring of their inputs, and how old they are.

All replayed tensors of all layers share the numbering. A step appends inputs and writes values only
where the ring has no room for the next one (`archs.spec.Replay`), so a rollback forgets inputs and
nothing else. A fork holds its source's slot once more; who writes first copies it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from archs.spec import Replay
from infer.counted import Counted
from infer.pages import StoreFullError
from infer.slots import FULL, ZERO, State


@dataclass(slots=True)
class RingChange:
    """What a step does to the replayed tensors of its sequences.

    slot, held, fold: as in `archs.state.Replayed`, a number for each sequence; whole: as there.
    copies: (source, target) slots to copy before any layer runs.
    before, after: the values of those that get tokens; written: slots whose value is overwritten.
    """

    slot: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    fold: list[int] = field(default_factory=list)
    whole: bool = False
    copies: list[tuple[int, int]] = field(default_factory=list)
    before: dict[int, State] = field(default_factory=dict)
    after: dict[int, State] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)


class RingTable:
    """Slots of up to `sequences` sequences, each with a value and a ring of `replay.rows` inputs.

    There are `count` slots: that of zeros, one for each sequence, `spare` ones for what is kept,
    and one for padding.
    """

    def __init__(self, *, sequences: int, replay: Replay, spare: int = 0) -> None:
        self.replay = replay
        self.spare = spare
        self.count = sequences + spare + 2
        self.padding = self.count - 1
        self._slots = Counted(sequences + spare, first=ZERO + 1)
        self.values = [State(0, ZERO)] * sequences

    @property
    def used(self) -> int:
        """Slots that some sequence holds."""
        return self._slots.used

    @property
    def refs(self) -> list[int]:
        """How many sequences hold each slot."""
        return self._slots.refs

    def current(self, sequence: int) -> int:
        """The slot of a sequence."""
        return self.values[sequence].slot

    def oldest(self, sequence: int) -> int:
        """The shortest length that a sequence can be taken back to."""
        return self.values[sequence].length

    def open(self, sequence: int) -> None:
        """An empty sequence."""
        self.values[sequence] = State(0, ZERO)

    def release(self, sequence: int) -> None:
        """Give a sequence's slot back."""
        self._drop(self.values[sequence].slot)
        self.values[sequence] = State(0, ZERO)

    def fork(self, source: int, target: int) -> None:
        """Let `target` share the slot of `source`."""
        self.values[target] = self.values[source]
        self._hold(self.values[target].slot)

    def keep(self, sequence: int) -> State:
        """Hold a sequence's slot once more, for nobody."""
        value = self.values[sequence]
        self._hold(value.slot)
        return value

    def forget(self, value: State) -> None:
        """Let go of a slot from `keep`, once."""
        self._drop(value.slot)

    def adopt(self, sequence: int, value: State) -> None:
        """Let an empty sequence share a slot from `keep`."""
        self._hold(value.slot)
        self.values[sequence] = value

    def truncate(self, sequence: int, length: int) -> None:
        """Cut a sequence to `length` tokens: what is held past them is forgotten, and of an empty
        sequence nothing is held.
        """
        if length == 0:
            self.release(sequence)

    def reserve(
        self, sequences: Sequence[int], lengths: Sequence[int], counts: Sequence[int],
        new_tokens: int,
    ) -> RingChange:  # fmt: skip
        """Give each sequence that gets tokens a slot of its own.

        Raises StoreFullError; nothing has changed then.
        """
        fresh = sum(
            count > 0 and not self._is_own(self.values[s].slot)
            for s, count in zip(sequences, counts, strict=True)
        )
        if fresh > self._slots.free:
            raise StoreFullError(FULL.format(self.spare))
        change, replay = RingChange(), self.replay
        held = [n - self.values[s].length for s, n in zip(sequences, lengths, strict=True)]
        change.whole = any(map(replay.overflows, held, counts)) or replay.overflows(0, new_tokens)
        for sequence, length, count, since in zip(sequences, lengths, counts, held, strict=True):
            value = self.values[sequence]
            if count == 0:
                # It keeps all that it holds, whatever the others do: nobody reads what it gets.
                change.slot.append(self.padding)
                change.held.append(0)
                change.fold.append(0)
                continue
            change.before[sequence] = value
            slot = self._own(sequence, value.slot, change)
            fold = since if change.whole else replay.folds(since, count)
            end = length + count if change.whole else value.length + fold
            if change.whole or fold:
                change.written.add(slot)
            self.values[sequence] = State(value.length, slot)
            change.after[sequence] = State(end, slot)
            change.slot.append(slot)
            change.held.append(since)
            change.fold.append(fold)
        return change

    def _own(self, sequence: int, slot: int, change: RingChange) -> int:
        if self._is_own(slot):
            return slot
        fresh = self._slots.take(ZERO + 1 + sequence)
        assert fresh is not None
        self._drop(slot)
        change.copies.append((slot, fresh))
        return fresh

    def _is_own(self, slot: int) -> bool:
        """Whether one sequence alone holds a slot."""
        return slot != ZERO and self._slots.refs[slot] == 1

    def settle(self, change: RingChange) -> None:
        """The step is done."""
        self.values = [change.after.get(s, value) for s, value in enumerate(self.values)]

    def undo(self, change: RingChange, *, written: bool) -> set[int]:
        """Take back what a step did; returns the sequences whose value it has overwritten.

        written: whether values may have been written. Inputs lie past those that are held.
        """
        lost, spoilt = set(), change.written if written else set()
        for sequence, value in change.before.items():
            slot = self.values[sequence].slot
            if slot != value.slot:
                self._hold(value.slot)
                self._drop(slot)
            self.values[sequence] = value
        for sequence, value in change.before.items():
            if value.slot in spoilt:
                self.release(sequence)
                lost.add(sequence)
        return lost

    def _hold(self, slot: int) -> None:
        if slot != ZERO:
            self._slots.hold(slot)

    def _drop(self, slot: int) -> None:
        if slot != ZERO:
            self._slots.drop(slot)
