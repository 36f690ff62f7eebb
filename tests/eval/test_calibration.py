"""Clocks that keep an engine's time: what is timed, and what follows from it."""

import platform
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.predict.accelerators import hardware_of
from eval.predict.calibration import Calibration, calibrate
from eval.predict.serving import StepTimes
from infer.engine import Engine
from infer.memory import keep_freed

SMALL = get_scale("tiny").with_options(
    {"d_model": 64, "head_dim": 32, "n_layers": 2, "vocab_size": 31, "seq_len": 16}
)
H100 = hardware_of("h100", "bfloat16", (1, 2, 4, 8), None).roofline


def engine_of(arch: str, *, pages: int | None = None, kept: int = 0) -> Engine:
    model = ModelSpec(arch=arch, scale=SMALL, hidden=16).build()
    return Engine(
        model, max_sequences=3, max_context=64, page_size=8, pages=pages, kept=kept, backend="torch"
    )


def times_of(arch: str, **options: bool) -> StepTimes:
    outline = ModelSpec(arch=arch, scale=get_scale("70m")).outline(torch.bfloat16)
    return StepTimes(outline, H100, max_context=512, padded=False, **options)


def test_ratios_hold_between_what_was_timed() -> None:
    found = Calibration(
        decode={1: {0: 1.0, 100: 2.0}, 4: {0: 3.0, 100: 3.0}}, chunks={2: {0: 5.0}, 8: {0: 7.0}}
    )
    held = np.array([0, 50, 100, 900])
    assert found.ratios(1, 1, held).tolist() == [1.0, 1.5, 2.0, 2.0]
    # Halfway from 1 to 4 sequences, as work doubles.
    assert found.ratios(2, 1, held[:1]).tolist() == [2.0]
    assert found.ratios(9, 1, held).tolist() == [3.0] * 4
    # Two chunks of two tokens are as one of four.
    assert found.ratios(2, 2, held[:1]).tolist() == [6.0]


def test_a_calibrated_clock_takes_that_many_times_as_long() -> None:
    times = times_of("gqa")
    twice = Calibration(decode={1: {0: 2.0}}, chunks={2: {0: 3.0}})
    slower = times.calibrated(twice)
    contexts = [10, 400]
    assert slower.decode_ms(contexts)(5) == pytest.approx(2 * times.decode_ms(contexts)(5))
    assert slower.rectangle_ms(contexts, 7) == pytest.approx(3 * times.rectangle_ms(contexts, 7))
    assert times.rectangle_ms(contexts, 1) == pytest.approx(times.decode_ms(contexts)(1))


def test_torch_reads_as_far_as_the_longest() -> None:
    mean, most = times_of("gqa"), times_of("gqa", to_longest=True)
    assert most.rectangle_ms([10, 400], 3) == mean.rectangle_ms([400, 400], 3)
    assert most.decode_ms([10, 400])(6) == pytest.approx(mean.decode_ms([400, 400])(6))
    assert most.decode_ms([10, 400])(6) > mean.decode_ms([10, 400])(6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("arch", ["gqa", "swa", "gdn:gqa=1:1"])
def test_every_batch_and_width_is_timed_and_nothing_stays_held(arch: str, shared: bool) -> None:
    engine = engine_of(arch, kept=2)
    asked: list[tuple[tuple[int, ...], int]] = []

    def predicted(held: Sequence[int], new_tokens: int) -> float:
        asked.append((tuple(held), new_tokens))
        return 1e-6

    found = calibrate(engine, predicted, token_budget=24, shared=shared)
    assert {batch: [*at] for batch, at in found.decode.items()} == {
        n: [n - 1, 32, 62] for n in (1, 2, 3)
    }
    assert {width: [*at] for width, at in found.chunks.items()} == {
        2: [0, 31], 8: [0, 28], 24: [0, 20],
    }  # fmt: skip
    assert ((32, 31, 30), 1) in asked and ((20,), 24) in asked
    assert (
        min(r for at in (*found.decode.values(), *found.chunks.values()) for r in at.values()) > 0
    )
    with engine.store.sequences(3) as sequences:
        assert [engine.store.length(s) for s in sequences] == [0, 0, 0]
    assert not any(table.used for table in engine.store.tables.values())


def test_contexts_without_room_are_left_out() -> None:
    engine = engine_of("gqa", pages=10)
    found = calibrate(engine, lambda held, new: 1.0, token_budget=8, shared=False)
    assert [*found.decode[1]] == [0, 32, 62]
    assert [*found.decode[2]] == [1, 32]
    assert [*found.decode[3]] == [2]


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_the_shortest_context_is_timed_as_far_as_it_goes(longest: int) -> None:
    model = ModelSpec(arch="gqa", scale=SMALL, hidden=16).build()
    engine = Engine(model, max_sequences=3, max_context=longest, page_size=1, backend="torch")
    found = calibrate(engine, lambda held, new: 1.0, token_budget=8, shared=False)
    assert found.ratios(3, 1, np.array([0])) > 0
    assert [*found.decode] == [*range(1, longest + 1)]
    assert (2 in found.chunks) == (longest > 1)


def test_this_process_keeps_what_it_frees_where_glibc_lets_it() -> None:
    assert keep_freed() == (platform.libc_ver()[0] == "glibc")
