"""Rows of what was measured: one meaning a column, throughput as documented."""

import pytest
import torch

from archs.cost import Cost, OpCost
from eval.measure.cell_rows import median_row, timing_rows
from eval.measure.decode import DecodeTiming
from eval.predict.machine import Roofline

#: Nine steps of 1 ms and one that stalled.
STALLED = DecodeTiming(
    batch=4, context=256, step_ms=(*[1.0] * 9, 11.0), warmup_ms=0, state_bytes=1,
    peak_state_bytes=4, calls=None,
)  # fmt: skip
COST = Cost.of(OpCost(name="matmul", matrix_flops=2_000_000, weight_bytes=1_000_000))


def test_times_have_percentiles_and_no_interval() -> None:
    rows = timing_rows(STALLED, COST, Roofline(1e9, 1e12, torch.float32))
    assert all(row.low is None and row.high is None for row in rows)
    found = {row.measure: row.value for row in rows}
    assert found["tpot_ms"] == 2.0 and found["tpot_p50_ms"] == 1.0
    assert found["tpot_p90_ms"] == pytest.approx(2.0)
    assert found["tpot_p99_ms"] == pytest.approx(10.1)
    assert found["output_tok_per_s"] == 4 * 1e3 / 2.0
    assert found["output_tok_per_s_per_user"] == 1e3 / 2.0
    assert found["mbu"] == pytest.approx(1_000_000 / 1e-3 / 1e9)


@pytest.mark.parametrize(("times", "median"), [([3.0, 9.0, 5.0], 5.0), ([1.0, 2.0], 1.5)])
def test_repeats_have_a_median_and_no_interval(times: list[float], median: float) -> None:
    row = median_row("ttft_ms", times, batch=1)
    assert (row.value, row.n, row.low, row.high) == (median, len(times), None, None)
