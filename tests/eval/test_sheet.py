"""Tables at any width: nothing is cut, titles differ, figures have units."""

import io
import re
from collections.abc import Sequence
from functools import cache

import pytest
from rich.console import Console

from eval.cli.kernels import planned
from eval.cli.show import lines, sheet
from eval.predict.crossover import crossovers, told
from eval.predict.isoquality import iso_quality_cost
from eval.predict.roofline import predict, predict_ops
from eval.report.leaderboard import merge, rank, to_table, wide
from eval.report.sheet import Field, Sheet
from tests.eval.test_crossover import COMMITTED
from tests.eval.test_isoquality import ladder

BENCH = {
    "arch": "mamba2:gqa=3:1", "kernel_backend": "torch-compile", "scale": "350m", "batch": 64,
    "context": 131072, "tpot_ms": 1234.5678, "tpot_p50_ms": 1233.4567, "tpot_p99_ms": 2345.6789,
    "output_tok_per_s": 123456.78, "state_bytes": 12345678, "status": "ok", "ttft_ms": 98765.4,
}  # fmt: skip
MADE = {
    "bench": lambda: [BENCH, BENCH | {"arch": "gqa", "tpot_ms": 1.0, "batch": 1}],
    "one": lambda: [BENCH],
    "crossover": lambda: [told(r) for r in crossovers("gdn", "gqa", "8b", ["h100", "h200"])],
    "isoquality": lambda: iso_quality_cost(ladder(seeds=2, noise=1e-3), "gqa", scale="8b"),
    "kernels": lambda: planned([])[::20],
    "ops": lambda: predict_ops(["mla"], "8b", ["h100"], [64], [131072]),
    "predict": lambda: predict(
        ["mha", "gdn:gqa=3:1"], "8b", ["h100", "h200"], [1, 64], [1024, 1 << 20]
    ),
}


@cache
def sheet_of(name: str) -> Sheet:
    return sheet(MADE[name]())


def drawn(table: Sheet, width: int) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, highlight=False).print(table)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 160])
@pytest.mark.parametrize("name", MADE)
def test_no_figure_is_cut_at_any_width(name: str, width: int) -> None:
    made = sheet_of(name)
    shown = drawn(made, width)
    assert max(map(len, shown)) <= width
    assert "…" not in "".join(shown)
    words = re.split(r"[ ;]+", " ".join(shown))
    for field in made.fields:
        for cell in field.cells if field.number or field.key else ():
            assert set(cell.split()) <= set(words), (field.title, cell)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_no_two_titles_are_alike(width: int) -> None:
    made = sheet_of("isoquality")
    titles = [" ".join(str(field.heading(field.least_width)).split()) for field in made.fields]
    assert len(set(titles)) == len(titles)
    assert [t for t in titles if t.startswith("size ratio")] == [
        "size ratio", "size ratio low", "size ratio high"
    ]  # fmt: skip


def test_a_leaderboard_fits_eighty_columns() -> None:
    table = rank(wide(merge([COMMITTED])))
    shown = drawn(to_table(table), 80)
    assert max(map(len, shown)) <= 80 and "…" not in "".join(shown)
    whole = drawn(to_table(table), 200)
    words = {word for word in " ".join(whole).split() if not word.startswith("─")}
    assert words <= set(" ".join(shown).split())
    # Every block says whose figures these are.
    assert sum("gdn:gqa=3:1" in line for line in shown) == sum("arch" in line for line in shown)


def test_what_all_rows_share_stands_once_where_room_is_short() -> None:
    table = Sheet(
        (
            Field("arch", ("a", "b"), key=True),
            Field("on", ("h100", "h100"), key=True),
            Field("TPOT ms", ("1.5", "22.25"), number=True),
        )
    )
    assert drawn(table, 40) == [
        "arch  on    TPOT ms", "───────────────────", "a     h100      1.5", "b     h100    22.25",
    ]  # fmt: skip
    narrow = [line.rstrip() for line in drawn(table, 11)]
    assert narrow == ["on h100", "       TPOT", "arch     ms", "───────────",
                      "a       1.5", "b     22.25"]  # fmt: skip
    assert "22.25" in "".join(drawn(table, 9))


@pytest.mark.parametrize(
    ("name", "values", "title", "cells"),
    [
        ("state_bytes", [4_096, 67_108_864], "state kB", ("4.096", "67,109")),
        ("state_bytes", [549_755_813_888], "state GB", ("549.8",)),
        ("state_bytes", [12, 0], "state B", ("12", "0")),
        ("state_bytes_per_token", [131072.0], "state kB per token", ("131.1",)),
        ("copy_bytes_per_s", [6293870141.756744], "copy GB/s", ("6.294",)),
        ("matrix_flops_per_s", [7.4e14], "matrix TFLOP/s", ("740",)),
        ("product_launch_us", [3.4], "product launch µs", ("3.4",)),
        ("step_bytes", [1, 10**12], "step GB", ("1e-09", "1,000")),
        ("context", [131072], "context", ("131,072",)),
        ("fits", [True, False], "fits", ("yes", "no")),
        ("tpot_ms", [None, 2.0], "TPOT ms", ("–", "2")),
    ],
)
def test_figures_have_units(
    name: str, values: Sequence[object], title: str, cells: tuple[str, ...]
) -> None:
    [field] = sheet([{name: value} for value in values]).fields
    assert (field.title, field.cells) == (title, cells)


def test_a_table_of_nothing_is_no_error() -> None:
    assert "".join(drawn(sheet([]), 80)) == "" and sheet([]).row_count == 0
    assert list(lines({"a_b": {"c": "d"}, "free_disk_bytes": 68e9})) == [
        "a b:", "  c: d", "free disk GB: 68"
    ]  # fmt: skip
