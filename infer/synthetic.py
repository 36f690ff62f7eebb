"""State that no model made, for timing steps at a context without computing it first."""

import torch
from torch import Tensor

from infer.coding import Coding
from infer.plan import StepPlan
from infer.rows import RowStep


def synthesise(step: StepPlan) -> None:
    """Write the new rows and the values of an open step's sequences, and nothing else.

    Every row is touched: memory that nobody wrote to may be one page of zeros, read from cache.
    """
    step.wrote_rows = step.wrote_fixed = True
    step.start_copies(joined=True)
    store = step.store
    runs = {key: new_rows(step, table) for key, table in step.tables.items()}
    slots = {s for row in step.slots.write for s in row if s >= 0}
    rings = set() if step.rings is None else set(step.rings.slot)
    for layer in store.pools.layers:
        for name, (key, pool, _) in layer.rows.items():
            for first, end in runs[key]:
                if name in layer.scales:
                    pool[..., first:end, :] = 1
                    layer.scales[name][..., first:end, :] = 0.01
                else:
                    _fill(pool[..., first:end, :], layer.codings.get(name))
        for name, value in layer.fixed.items():
            for slot in rings if name in layer.inputs else slots:
                _fill(value[slot], layer.codings.get(name))


def _fill(held: Tensor, coding: Coding | None) -> None:
    if coding is None or coding.format.is_plain:
        held.fill_(0.01 if held.dtype.is_floating_point else 1)
    else:
        held.copy_(coding.encode(torch.full((coding.numbers,), 0.01, device=held.device)))


def new_rows(step: StepPlan, table: RowStep) -> list[tuple[int, int]]:
    """Pool rows [first, end) of the step's rows that are kept, long runs of them as one."""
    pages, size = table.table, table.table.page_size
    runs: list[tuple[int, int]] = []
    for sequence, length, end in zip(step.sequences, table.lengths, table.ends, strict=True):
        for index, page in sorted(pages.tables[sequence].items()):
            offset = (page - index) * size
            first, last = max(length, index * size), min(end, (index + 1) * size)
            if first >= last:
                continue
            if runs and runs[-1][1] == offset + first:
                runs[-1] = runs[-1][0], offset + last
            else:
                runs.append((offset + first, offset + last))
    return runs
