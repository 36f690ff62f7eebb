"""Undoing a step that failed: pages go back, fixed tensors come from their snapshots.

A window's rows, and recurrent state without lookback, are overwritten in place, for a copy before
every step would cost as much as the step's own writes. What a step has overwritten is therefore
lost, and whoever undoes it is told of which sequences.
"""

from infer.view import StepView, Store


def undo(step: StepView) -> set[int]:
    """Bring a step's sequences back to where they were before it; returns the slots that cannot.

    What a rollback can reach (`Store.oldest`) shrinks by what was overwritten.
    """
    store, lost = step.store, set[int]()
    lengths = dict(zip(step.slots, step.lengths, strict=True))
    for table in step.tables.values():
        lost |= table.table.undo(table.change, lengths, written=step.wrote_rows)
    if step.wrote_fixed and any(store.slots):
        lost |= _restore_fixed(store, step)
    for slot in step.slots:
        reach = (table.reach(slot) for table in store.tables.values())
        store.oldest[slot] = max(store.oldest[slot], *reach, 0)
    return lost


def _restore_fixed(store: Store, step: StepView) -> set[int]:
    """The ring of snapshots holds the values before the step unless it came round to them."""
    size, lost = store.lookback + 1, set()
    for slot, length, count in zip(step.slots, step.lengths, step.counts, strict=True):
        overwritten = count >= size if step.each else count % size == 0
        if not store.lookback or overwritten:
            lost.add(slot)
            continue
        for fixed, history in zip(store.slots, store.history, strict=True):
            for name, ring in history.items():
                fixed[name][slot].copy_(ring[slot, length % size])
        oldest = length + count - store.lookback if step.each else length
        store.oldest[slot] = max(store.oldest[slot], oldest)
    return lost
