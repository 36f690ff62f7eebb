"""Slots of values: any history of steps, forks, rollbacks and failures, on a made-up memory."""

import random
from collections.abc import Iterator

import pytest

from archs.spec import RECURRENT_LIMIT
from infer.slots import ZERO, SlotChange, SlotTable

SEQUENCES = 4
History = tuple[int, ...]


class Model:
    """A table, what lies in its slots (the tokens that made a value), and what was told."""

    def __init__(self, lookback: int, seed: int) -> None:
        self.table = SlotTable(sequences=SEQUENCES, lookback=lookback)
        self.memory: dict[int, History] = {ZERO: ()}
        self.told: dict[int, History] = {}
        self.chance = random.Random(seed)

    def act(self) -> None:
        """One thing that a store does."""
        free = [s for s in range(SEQUENCES) if s not in self.told]
        doing = self.chance.choice(["open", "fork", "release", "rollback", "step", "step", "step"])
        if not self.told or (doing == "open" and free):
            self.table.open(free[0])
            self.told[free[0]] = ()
        elif doing == "fork" and free:
            source = self.chance.choice(sorted(self.told))
            self.table.fork(source, free[0])
            self.told[free[0]] = self.told[source]
        elif doing == "release":
            sequence = self.chance.choice(sorted(self.told))
            self.table.release(sequence)
            del self.told[sequence]
        elif doing == "rollback":
            sequence = self.chance.choice(sorted(self.told))
            length = self.chance.randint(self.table.oldest(sequence), len(self.told[sequence]))
            self.table.truncate(sequence, length)
            self.told[sequence] = self.told[sequence][:length]
        elif doing == "step":
            self.step(self.chance.choice([None, None, "before", "within"]))

    def step(self, fails: str | None) -> None:
        """A step of some sequences, which may fail before its copies or among its writes."""
        some = self.chance.sample(sorted(self.told), self.chance.randint(1, len(self.told)))
        new = self.chance.choice([1, 1, 1, 2, 3, 5, 8, 9, 20])
        counts = [self.chance.choice([new, new, self.chance.randint(0, new)]) for _ in some]
        before = {s: list(self.table.states[s]) for s in some}
        change = SlotChange()
        for sequence, count in zip(some, counts, strict=True):
            self.table.reserve(sequence, len(self.told[sequence]), count, new, change)
        self.hold_to_the_rules(change)
        if fails == "before":
            assert self.table.undo(change, written=False) == set()
            assert {s: self.table.states[s] for s in some} == before
            return
        for source, target in change.copies:
            self.memory[target] = self.memory[source]
        writes = list(self.writes(some, counts, change))
        if fails == "within":
            self.memory.update(writes[: len(writes) // 2])
            for lost in self.table.undo(change, written=True):
                self.table.release(lost)
                del self.told[lost]
            return
        self.memory.update(writes)
        for sequence, count in zip(some, counts, strict=True):
            self.told[sequence] += self.tokens(sequence, count)
        self.table.settle(change)

    def tokens(self, sequence: int, count: int) -> History:
        """What a sequence is told next."""
        return tuple(100 * sequence + len(self.told[sequence]) + i for i in range(count))

    def writes(
        self, some: list[int], counts: list[int], change: SlotChange
    ) -> Iterator[tuple[int, History]]:
        """The slots that a step writes, and what it writes; reads come before all writes."""
        rows = zip(some, counts, change.read, change.write, strict=True)
        for sequence, count, read, write in rows:
            past, fresh = self.memory[read], self.tokens(sequence, count)
            assert past == self.told[sequence]
            for token, slot in enumerate(write):
                if slot >= 0:
                    yield slot, past + fresh[: token + 1]

    def hold_to_the_rules(self, change: SlotChange) -> None:
        """`kernels.recurrent.step`: nobody writes what another reads, and oneself only the last."""
        written = [slot for row in change.write for slot in row if slot >= 0]
        assert len(set(written)) == len(written) and ZERO not in written
        for row, (read, write, last) in enumerate(
            zip(change.read, change.write, change.last, strict=True)
        ):
            kept = [slot for slot in write if slot >= 0]
            assert last == (kept[-1] if kept else self.table.padding)
            others = {s for other, w in enumerate(change.write) if other != row for s in w}
            assert read not in others and read not in kept[:-1]
            assert self.table.padding not in (read, *kept)

    def check(self) -> None:
        """Every value in reach is there, held once by each who holds it."""
        refs = [0] * len(self.table.refs)
        for sequence, told in self.told.items():
            states = self.table.states[sequence]
            assert [s.length for s in states] == list(range(states[0].length, len(told) + 1))
            assert len(states) <= self.table.lookback + 1
            for state in states:
                assert self.memory[state.slot] == told[: state.length]
                refs[state.slot] += state.slot != ZERO
        assert refs == self.table.refs
        assert self.table.used == sum(n > 0 for n in refs)


@pytest.mark.parametrize("lookback", [0, 1, 2, 4, 12])
def test_any_history_finds_every_value_in_reach(lookback: int) -> None:
    for seed in range(60):
        model = Model(lookback, seed)
        for _ in range(60):
            model.act()
            model.check()


def test_all_who_share_a_value_leave_it_in_one_step() -> None:
    """Four forks of one sequence: as many slots as their values need, and no more."""
    table = SlotTable(sequences=4, lookback=2)
    table.open(0)
    for length in range(4):
        change = SlotChange()
        table.reserve(0, length, 1, 1, change)
        table.settle(change)
    for child in (1, 2, 3):
        table.fork(0, child)
    assert table.used == 3
    change = SlotChange()
    for sequence in range(4):
        table.reserve(sequence, 4, 3, 3, change)
    table.settle(change)
    assert table.used == 4 * 3 == table.count - 2


@pytest.mark.parametrize(("step", "reach"), [(RECURRENT_LIMIT, 3), (RECURRENT_LIMIT + 1, 0)])
def test_a_long_step_keeps_its_last_value_alone(step: int, reach: int) -> None:
    table, change = SlotTable(sequences=1, lookback=3), SlotChange()
    table.open(0)
    table.reserve(0, 0, step, step, change)
    table.settle(change)
    assert table.oldest(0) == step - reach and table.used == reach + 1
