"""The verdict: leads only where a test or the clock shows one, ties and gaps said as such."""

from pathlib import Path
from typing import Any

import pytest

from eval.report.leaderboard import merge, rank, wide
from eval.report.verdict import verdict
from eval.results.point import Point
from eval.results.rows import About, Row
from tests.eval.synthetic import write_run
from tests.eval.test_leaderboard import record, scored


def told(folder: Path) -> str:
    long = merge([folder])
    return " ".join(verdict(long, rank(wide(long))))


def decoded(arch: str, tpot_ms: dict[int, float], state_bytes: float = 1e6) -> Any:
    """Latencies by context at batch 1, and the state at each."""
    rows = [Row(measure="tpot_ms", value=ms, context=c) for c, ms in tpot_ms.items()]
    rows += [Row(measure="state_bytes", value=state_bytes * c, context=c) for c in tpot_ms]
    return Point(arch=arch, stage="decode", scale="70m", batch=1), About(), rows


def test_the_one_that_is_ahead_of_all_leads(tmp_path: Path) -> None:
    cells = [scored("gqa", 1.9, 1.95), scored("mha", 2.1, 2.2), scored("swa", 2.1, 2.3)]
    said = told(record(tmp_path, *cells))
    assert "In quality gqa leads, ahead of all 2 others beyond chance (bits per byte, " in said
    assert "trained at scale tiny" in said
    assert "Not measured: tasks and decode speed." in said


def test_those_that_no_test_tells_apart_are_tied(tmp_path: Path) -> None:
    cells = [scored("gqa", 1.9, 1.95), scored("mha", 1.91, 1.96), scored("swa", 2.5, 2.6)]
    said = told(record(tmp_path, *cells))
    assert "In quality gqa and mha lead, tied: of 3 architectures none is ahead of any" in said


def test_without_a_difference_nobody_leads(tmp_path: Path) -> None:
    said = told(record(tmp_path, scored("gqa", 1.9, 2.1), scored("mha", 1.95, 2.2)))
    assert "In quality no architecture leads: none of 2 is ahead of another" in said


@pytest.mark.parametrize("cells", [
    [scored("gqa", 1.9, 2.1)], [scored("gqa", None, None), scored("mha", None, None)],
], ids=["one", "no intervals"])  # fmt: skip
def test_quality_that_cannot_be_compared(tmp_path: Path, cells: list[Any]) -> None:
    said = told(record(tmp_path, *cells))
    assert "leads" not in said
    assert "Quality is not compared" in said


def test_who_has_no_quality_is_named(tmp_path: Path) -> None:
    cells = [scored("gqa", 1.9, 1.95), scored("mha", 2.1, 2.2), decoded("mla", {256: 1.0})]
    assert "trained at scale tiny, without mla" in told(record(tmp_path, *cells))


def test_the_fastest_at_the_longest_context_of_all(tmp_path: Path) -> None:
    """mha was not timed at 4,096 tokens, where gdn would be ten times as fast as gqa."""
    cells = [
        decoded("gqa", {256: 1.0, 1024: 1.5, 4096: 9.0}, 2e3),
        decoded("mha", {256: 2.0, 1024: 6.0}, 16e3),
        decoded("gdn", {256: 1.1, 1024: 1.0, 4096: 0.9}, 1e3),
    ]
    said = told(record(tmp_path, *cells))
    assert "At 1,024 tokens gdn decodes fastest: 1 ms against 6 ms of mha, the slowest" in said
    assert "time per output token, batch 1, 70m shapes · AMD EPYC" in said
    assert "a sequence keeps 1.02 MB of state in gdn, 16.4 MB in mha, 16 times as much" in said
    assert "Not measured: bits per byte and tasks." in said


def test_times_within_the_noise_of_a_clock_are_tied(tmp_path: Path) -> None:
    cells = [decoded("gqa", {256: 1.0}), decoded("mha", {256: 1.04}), decoded("mla", {256: 2.0})]
    said = told(record(tmp_path, *cells))
    assert "gqa and mha decode fastest, tied within 5 %: 1 ms against 2 ms of mla" in said
    assert "the state of a sequence takes 256 MB in all of them" in said


def test_nobody_is_faster_where_all_are_equal(tmp_path: Path) -> None:
    said = told(record(tmp_path, decoded("gqa", {256: 1.0}), decoded("mha", {256: 1.04})))
    assert "At 256 tokens no architecture decodes faster: all 2 are within 5 % of 1 ms" in said


def test_a_lone_time_and_who_was_not_timed(tmp_path: Path) -> None:
    said = told(record(tmp_path, decoded("gqa", {256: 1.0}), scored("mha", 1.0, 1.1)))
    assert "At 256 tokens only gqa was timed: 1 ms" in said
    assert "; mha not timed there." in said


def test_every_figure_is_one_of_the_table(tmp_path: Path) -> None:
    """A whole run: the fastest of the table's own column, and the extremes of its state."""
    long = merge([write_run(tmp_path, seeds=2)])
    table = rank(wide(long))
    said = " ".join(verdict(long, table))
    times = table.set_index("arch")["tpot_p50_ms@70m/b1/c16384"]
    fastest = times.idxmin()
    assert times.nsmallest(2).iloc[1] < 1.05 * times.min()
    assert f"At 16,384 tokens {fastest}" in said
    assert (
        f": {times.min():.3g} ms against {times.max():.3g} ms of mha, the slowest (median" in said
    )
    assert "1.05 MB of state in linear, 1.07 GB in mha, 1,024 times as much" in said
    assert "Not measured" not in said
