"""Host work per step: it grows with the batch, not with pools, layers or contexts."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import infer
from archs.formats import Format
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.spec import RowSpec, StateSpec
from eval.proof.bench_host import decoding_server
from infer.pages import TableKey
from infer.store import StateStore

KV = RowSpec(name="kv", shape=(1, 1), format=Format.of(torch.float16))
OURS = str(Path(infer.__path__[0]))


def bytecodes(work: Callable[[], object]) -> int:
    """Instructions that our code executes in `work`: exact, and blind to the machine's load."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def step_at(
    *, batch: int = 8, layers: int = 2, context: int = 32, window: int | None = None,
    spare: int = 0,
) -> int:  # fmt: skip
    """Instructions of a step in which every sequence gains a page."""
    store = StateStore(
        [StateSpec(rows=(replace(KV, window=window),))] * layers, max_sequences=batch + spare,
        max_context=2 * context, page_size=8,
    )  # fmt: skip
    slots = [store.add() for _ in range(batch)]
    store.fill(slots, context)
    return bytecodes(lambda: store.commit(store.begin(slots, 1)))


@pytest.mark.parametrize("window", [None, 24])
def test_a_step_takes_no_more_work_at_longer_contexts(window: int | None) -> None:
    assert step_at(window=window, context=4096) <= 1.05 * step_at(window=window, context=64)


def test_a_step_takes_no_more_work_for_a_wider_window() -> None:
    assert step_at(context=4096, window=2048) <= 1.05 * step_at(context=4096, window=24)


def test_a_step_takes_no_more_work_with_more_layers() -> None:
    assert step_at(layers=64) <= 1.05 * step_at(layers=2)


def test_work_grows_with_the_batch_and_no_faster() -> None:
    assert step_at(batch=64) <= 8.4 * step_at(batch=8)


def test_open_slots_beside_the_batch_take_no_work() -> None:
    assert step_at(spare=500) <= 1.05 * step_at()


def last_page_of(pages: int) -> int:
    """Instructions of a step that needs the one page that is free, far from those taken lately."""
    store = StateStore(
        [StateSpec(rows=(KV,))], max_sequences=3, max_context=pages, page_size=1, pages=pages
    )
    first, second, third = (store.add() for _ in range(3))
    for slot, length in ((second, 1), (third, pages // 2 - 1), (first, pages // 2)):
        store.fill([slot], length)
    store.release(second)
    work = bytecodes(lambda: store.commit(store.begin([first], 1)))
    assert store.tables[TableKey(1, None, 0)].used == pages
    return work


def test_a_free_page_is_found_without_a_search() -> None:
    assert last_page_of(2048) <= 1.05 * last_page_of(32)


def test_a_rollback_takes_no_more_work_at_longer_contexts() -> None:
    def work(context: int) -> int:
        store = StateStore(
            [StateSpec(rows=(KV,))], max_sequences=1, max_context=context, page_size=8
        )
        slot = store.add()
        store.fill([slot], context)
        return bytecodes(lambda: store.rollback(slot, 9))

    assert work(8192) <= 1.05 * work(64)


@pytest.mark.parametrize("lookback", [0, 4])
def test_a_step_of_64_sequences_of_the_1b_hybrid_takes_less_than_a_millisecond(
    lookback: int,
) -> None:
    """Every sequence gains a page. A millisecond is some 120,000 of them on one core of an EPYC."""
    spec = ModelSpec(arch="gdn:gqa=3:1", scale=get_scale("1b")).outline(torch.bfloat16)
    store = StateStore(
        spec.state_specs(), max_sequences=64, max_context=8192, lookback=lookback,
        device="meta", kernels=True,
    )  # fmt: skip
    sequences = [store.add() for _ in range(64)]
    store.fill(sequences, 5 * 64 - 6)
    for _ in range(6):
        store.commit(store.begin(sequences, 1))

    def step() -> None:
        plan = store.begin(sequences, 1)
        plan.send(64)
        store.commit(plan)

    gained = store.tables[TableKey(1, None, 0)].used
    work = bytecodes(step)
    assert store.tables[TableKey(1, None, 0)].used == gained + 64
    assert work <= 75_000, work


def test_a_server_that_looks_ahead_has_no_more_to_do() -> None:
    """Of 64 sequences of the 1b hybrid; the host's tokens need not be sent then."""
    work = {}
    for ahead in (False, True):
        server = decoding_server(ahead=ahead)
        work[ahead] = min(bytecodes(server.step) for _ in range(4))
        server.close()
    assert work[True] <= 1.01 * work[False], work
    assert work[True] <= 65_000, work
