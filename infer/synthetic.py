"""State that no model made, for timing steps at a context without computing it first."""

from torch import Tensor

from infer.table_step import TableStep
from infer.view import StepView


def synthesise(step: StepView) -> None:
    """Write the new rows and the fixed tensors of an open step's sequences, and nothing else.

    Every row is touched: memory that nobody wrote to may be one page of zeros, read from cache.
    """
    step.copy_shared()
    step.wrote_fixed = True
    store = step.store
    runs = {key: new_rows(step, table) for key, table in step.tables.items()}
    layers = zip(store.specs, store.pools, store.slots, store.history, strict=True)
    for spec, pools, fixed, history in layers:
        for pool in pools.values():
            for first, end in runs[spec.window, spec.sinks]:
                _fill(pool[..., first:end, :])
        for tensor in (*fixed.values(), *history.values()):
            for slot in step.slots:
                _fill(tensor[slot])


def _fill(tensor: Tensor) -> None:
    tensor.fill_(0.01 if tensor.dtype.is_floating_point else 1)


def new_rows(step: StepView, table: TableStep) -> list[tuple[int, int]]:
    """Pool rows [first, end) of the step's tokens that are kept, long runs of them as one."""
    pages, size = table.table, table.table.page_size
    runs: list[tuple[int, int]] = []
    for slot, length, count in zip(step.slots, step.lengths, step.counts, strict=True):
        for index, page in sorted(pages.tables[slot].items()):
            offset = (page - index) * size
            first, end = max(length, index * size), min(length + count, (index + 1) * size)
            if first >= end:
                continue
            if runs and runs[-1][1] == offset + first:
                runs[-1] = runs[-1][0], offset + end
            else:
                runs.append((offset + first, offset + end))
    return runs
