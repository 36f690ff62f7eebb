"""The wide table: unlike figures never meet, and only leads beyond chance make a rank."""

from collections.abc import Mapping
from dataclasses import replace
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from archs.errors import UserError
from eval.report.figures import Figures
from eval.report.leaderboard import Column, headlines, merge, rank, to_table, wide
from eval.results.point import Point
from eval.results.rows import CELL_FAILED, About, Provenance, Row, Status
from eval.results.schema import load_long
from eval.results.statistics import student_t_mean
from eval.results.tidy import tidy
from tests.eval.synthetic import ARCHS, HERE, Recorded, write_run

BITS = "bits_per_byte@tiny/c128"


def record(folder: Path, *cells: tuple[Point, About, list[Row]], where: Provenance = HERE) -> Path:
    """A run folder that holds just these points."""
    results = Recorded(where)
    for cell in cells:
        results.append(*cell)
    return results.write(folder)


def scored(arch: str, low: float | None, high: float | None, seed: int = 0) -> Any:
    """Bits per byte with an interval."""
    middle = 2.0 if low is None or high is None else (low + high) / 2
    row = Row(measure="bits_per_byte", value=middle, low=low, high=high, context=128)
    return Point(arch=arch, stage="train", scale="tiny", seed=seed), About(), [row]


def timed(arch: str, tpot_ms: float, **about: Any) -> Any:
    """One latency."""
    row = Row(measure="tpot_ms", value=tpot_ms, context=256)
    return Point(arch=arch, stage="decode", scale="70m", batch=1), About(**about), [row]


def board(folder: Path) -> pd.DataFrame:
    return rank(wide(merge([folder])))


def ranks(folder: Path) -> Mapping[str, str]:
    table = board(folder)
    return dict(zip(table["arch"], table["rank"], strict=True))


# -- wide --


def test_one_architecture_a_row(tmp_path: Path) -> None:
    table = wide(load_long(write_run(tmp_path, seeds=1) / "results.csv"))
    assert tuple(table["arch"]) == ARCHS
    for name in (BITS, "accuracy@mqar/c32", "tpot_ms@70m/b1/c4096", "state_bytes_fixed@70m",
                 "params@70m", "hardware", "commit", "config_hash"):  # fmt: skip
        assert table[name].notna().all(), name
    families = dict(zip(table["arch"], table["family"], strict=True))
    assert families["mla"] == "latent"
    assert families["gdn:gqa=3:1"] == "hybrid"


def test_a_figure_is_the_one_that_was_recorded(tmp_path: Path) -> None:
    table = wide(merge([record(tmp_path, timed("gqa", 1.25), timed("mha", 3.5))]))
    assert dict(zip(table["arch"], table["tpot_ms@70m/b1/c256"], strict=True)) == {
        "gqa": 1.25, "mha": 3.5,
    }  # fmt: skip


def test_seeds_are_averaged_with_student_s_interval(tmp_path: Path) -> None:
    cells = [scored("gqa", x - 0.5, x + 0.5, seed) for seed, x in enumerate((1.0, 2.0, 4.5))]
    row = wide(merge([record(tmp_path, *cells)])).iloc[0]
    half = student_t_mean([1.0, 2.0, 4.5]).half
    assert half == pytest.approx(4.302653 * (3.25 / 3) ** 0.5, rel=1e-6)
    assert row[BITS] == 2.5
    assert row[f"{BITS}:high"] - row[BITS] == pytest.approx(half)
    assert row[f"{BITS}:low"] == 0.0
    assert row[f"{BITS}:n"] == 3


def test_columns_are_parsed_as_they_are_printed() -> None:
    for name in ("tpot_ms@70m/b1/c256", "mlp_hidden@tiny", "mbu@1b/b8/c1024/bfloat16/NVIDIA H200"):
        assert str(Column.parse(name)) == name
    for name in ("arch", "tpot_ms@70m/b1/c256:low", "speed@70m", "params@70m"):
        assert Column.parse(name) is None


# -- unlike figures --


@pytest.mark.parametrize(
    "change",
    [
        {"about": {"dtype": "bfloat16"}},
        {"about": {"kernel_backend": "triton"}},
        {"where": {"hardware": "NVIDIA H200"}},
        {"about": {"corpus": "stdlib"}},
        {"about": {"tokens": 999}},
    ],
    ids=lambda change: next(iter(next(iter(change.values())))),
)
def test_unlike_settings_never_overwrite_each_other(
    tmp_path: Path, change: dict[str, dict[str, Any]]
) -> None:
    base: dict[str, Any] = {"corpus": "sotu", "tokens": 100}
    first = record(tmp_path / "a", timed("gqa", 1.0, **base))
    there = replace(HERE, **change.get("where", {}))
    about = {**base, **change.get("about", {})}
    second = record(tmp_path / "b", timed("gqa", 9.0, **about), where=there)
    table = wide(merge([first, second]))
    columns = [c for c in table.columns if str(c).startswith("tpot_ms@")]
    assert sorted(table[columns].iloc[0]) == [1.0, 9.0]
    value = str(next(iter(next(iter(change.values())).values())))
    assert any(value in str(c) for c in columns)


def test_runs_that_contradict_each_other_keep_their_figures(tmp_path: Path) -> None:
    first = record(tmp_path / "a", timed("gqa", 1.0), timed("mha", 2.0))
    second = record(tmp_path / "b", timed("gqa", 9.0))
    for order in ([first, second], [second, first]):
        table = wide(merge(order)).set_index("arch")
        assert table.at["gqa", "tpot_ms@70m/b1/c256/a"] == 1.0
        assert table.at["gqa", "tpot_ms@70m/b1/c256/b"] == 9.0
        assert table.at["mha", "tpot_ms@70m/b1/c256/a"] == 2.0
        assert isnan(table.at["mha", "tpot_ms@70m/b1/c256/b"])
    assert wide(merge([first, second])).set_index("arch").at["mha", "run"] == "a"


def test_runs_that_agree_share_a_column(tmp_path: Path) -> None:
    first = record(tmp_path / "a", timed("gqa", 1.0), timed("mha", 2.0))
    other = replace(HERE, config_hash="another")
    second = record(tmp_path / "b", timed("gqa", 1.0), timed("swa", 3.0), where=other)
    table = wide(merge([first, second])).set_index("arch")
    assert table["tpot_ms@70m/b1/c256"].to_dict() == {"gqa": 1.0, "mha": 2.0, "swa": 3.0}


def test_trainings_of_another_configuration_are_no_seeds(tmp_path: Path) -> None:
    """Steps, vocabulary, optimiser and rates are in the configuration alone."""
    other = replace(HERE, config_hash="another")
    first = record(tmp_path / "a", scored("gqa", 0.9, 1.1), scored("gqa", 0.8, 1.0, seed=1))
    second = record(tmp_path / "b", scored("gqa", 1.9, 2.1, seed=2), where=other)
    row = wide(merge([first, second])).iloc[0]
    assert (row[f"{BITS}/a"], row[f"{BITS}/b"]) == (pytest.approx(0.95), 2.0)
    assert row[f"{BITS}/a:n"] == 2
    figures = Figures(merge([first, second])).quality("bits_per_byte")[1]
    assert list(figures["value"]) == [2.0]
    again = merge([first, second])
    pd.testing.assert_frame_equal(tidy(again), again)


def test_committed_runs_of_two_recipes_stand_side_by_side() -> None:
    cpu = Path(__file__).parent.parent.parent / "leaderboards" / "cpu-2-threads"
    runs = ("2026-11-23", "2026-11-24-small")
    row = wide(merge([cpu / run for run in runs])).set_index("arch").loc["mamba1"]
    recall = {str(c): row[c] for c in row.index if str(c).startswith("accuracy@")}
    values = {name.rpartition("/")[2]: v for name, v in recall.items() if ":" not in name}
    assert {run: round(100 * values[run], 1) for run in runs} == {runs[0]: 35.5, runs[1]: 99.6}
    assert all(v <= 1 for name, v in recall.items() if name.endswith(":high"))
    apart = {c.rpartition("/")[2] for c in map(str, row.index) if c.startswith("tpot_p50_ms@70m/")}
    assert set(runs) <= apart


def test_the_interval_of_a_share_stays_within_0_and_1(tmp_path: Path) -> None:
    cells = []
    for seed, value in enumerate((0.355, 0.996)):
        row = Row(measure="accuracy", value=value, context=32)
        cells.append((Point(arch="gqa", stage="task", scale="mqar", seed=seed), About(), [row]))
    row = wide(merge([record(tmp_path, *cells)])).iloc[0]
    ends = row["accuracy@mqar/c32:low"], row["accuracy@mqar/c32:high"]
    assert ends == (0.0, 1.0)


def test_runs_join_by_architecture(tmp_path: Path) -> None:
    quality = record(tmp_path / "laptop", scored("gqa", 1.9, 2.1))
    speed = record(tmp_path / "gpu", timed("gqa", 1.0), where=replace(HERE, hardware="H200"))
    row = wide(merge([quality, speed / "results.csv"])).iloc[0]
    assert (row[BITS], row["tpot_ms@70m/b1/c256"]) == (2.0, 1.0)
    assert row["run"] == "laptop; gpu"
    assert row["hardware"] == f"{HERE.hardware}; H200"


# -- ranks --


def test_only_leads_beyond_chance_make_a_rank(tmp_path: Path) -> None:
    cells = [scored("mha", 1.0, 1.2), scored("gqa", 1.1, 1.5), scored("mqa", 1.4, 1.6),
             scored("swa", 1.7, 1.8)]  # fmt: skip
    folder = record(tmp_path, *cells)
    assert ranks(folder) == {"mha": "1–2", "gqa": "1–3", "mqa": "2–3", "swa": "4"}
    ahead = board(folder).set_index("arch")[f"{BITS}:ahead_of"].to_dict()
    assert {arch: set(filter(None, worse.split("; "))) for arch, worse in ahead.items()} == {
        "mha": {"mqa", "swa"}, "gqa": {"swa"}, "mqa": {"swa"}, "swa": set(),
    }  # fmt: skip


def test_a_rank_is_corrected_for_all_pairs(tmp_path: Path) -> None:
    """A lead of 2.3 standard errors counts between two, not among thirteen."""
    pair = [scored("mha", 1.0, 1.2), scored("gqa", 1.165, 1.365)]
    assert ranks(record(tmp_path / "two", *pair)) == {"mha": "1", "gqa": "2"}
    many = [*pair, *(scored(arch, 1.08, 1.28) for arch in ARCHS[2:])]
    assert set(ranks(record(tmp_path / "many", *many)).values()) == {"1–13"}


def test_a_figure_without_interval_has_no_rank(tmp_path: Path) -> None:
    alone = record(tmp_path / "alone", scored("mha", None, None))
    assert ranks(alone) == {"mha": ""}
    mixed = record(
        tmp_path / "mixed", scored("mha", None, None), scored("gqa", 1.0, 1.1),
        scored("swa", 2.0, 2.1),
    )  # fmt: skip
    assert ranks(mixed) == {"gqa": "1", "mha": "", "swa": "2"}


def test_higher_is_better_where_it_is(tmp_path: Path) -> None:
    rows = [Row(measure="accuracy", value=v, low=v - 0.01, high=v + 0.01, context=32)
            for v in (0.5, 0.9)]  # fmt: skip
    cells = [(Point(arch=a, stage="task", scale="mqar"), About(), [row])
             for a, row in zip(("mha", "gqa"), rows, strict=True)]  # fmt: skip
    table = rank(wide(merge([record(tmp_path, *cells)])), "accuracy@mqar/c32")
    assert dict(zip(table["arch"], table["rank"], strict=True)) == {"gqa": "1", "mha": "2"}
    with pytest.raises(UserError, match=r"'tpot_ms@70m' is not a figure.*such as ac"):
        rank(table.drop(columns="rank"), "tpot_ms@70m")


# -- failures --


def test_failed_cells_keep_their_row_and_say_why(tmp_path: Path) -> None:
    oom = Row(measure=CELL_FAILED, status=Status.OOM, note="too large")
    cell = Point(arch="mha", stage="decode", scale="70m", batch=1)
    table = board(record(tmp_path, timed("gqa", 1.0), (cell, About(), [oom])))
    row = table.set_index("arch").loc["mha"]
    assert row["status"] == "oom ×1"
    assert isnan(row["tpot_ms@70m/b1/c256"])
    assert row["tpot_ms@70m/b1/c256:status"] == "oom"
    latency = next(h for h in headlines(table) if h.title == "TPOT ms")
    assert [latency.text(r) for _, r in table.iterrows()] == ["1.00", "oom"]
    assert to_table(table).row_count == 2


def test_a_failure_that_succeeded_later_is_gone(tmp_path: Path) -> None:
    failed = Row(measure=CELL_FAILED, status=Status.ERROR)
    cell = Point(arch="gqa", stage="decode", scale="70m", batch=1)
    first = record(tmp_path / "a", (cell, About(), [failed]))
    second = record(tmp_path / "b", timed("gqa", 1.0))
    assert wide(merge([first, second])).iloc[0]["status"] == "ok"
    assert wide(merge([second, first])).iloc[0]["status"] == "error ×1"


def test_one_seed_that_failed_leaves_the_mean_of_the_others(tmp_path: Path) -> None:
    nan = Row(measure=CELL_FAILED, status=Status.NAN)
    cell = Point(arch="gqa", stage="train", scale="tiny", seed=2)
    cells = [scored("gqa", 0.9, 1.1), scored("gqa", 1.9, 2.1, seed=1), (cell, About(), [nan])]
    row = wide(merge([record(tmp_path, *cells)])).iloc[0]
    assert (row[BITS], row[f"{BITS}:n"], row["status"]) == (1.5, 2, "nan ×1")


def test_a_run_without_architectures_is_refused(tmp_path: Path) -> None:
    machine = Row(measure="copy_bytes_per_s", value=1e9)
    folder = record(tmp_path, (Point(arch="", stage="hardware"), About(), [machine]))
    with pytest.raises(UserError, match="no architecture yet; run"):
        board(folder)
    with pytest.raises(UserError, match="no runs to merge; name at least one"):
        merge([])


def test_documents_of_two_corpora_are_not_compared(tmp_path: Path) -> None:
    """Two runs of one suite on different text have cells of the same name."""
    folders = []
    for corpus, shift in (("sotu", 0.0), ("stdlib", 5.0)):
        about = About(corpus=corpus)
        cells = []
        for arch, lead in (("mha", 0.0), ("gqa", 0.1)):
            values = [shift + lead + v for v in (1.0, 1.2, 1.4)]
            rows = [Row(measure="document_bits_per_byte", value=v, n=100, context=128, position=d)
                    for d, v in enumerate(values, 1)]  # fmt: skip
            cell, _, whole = scored(arch, shift + lead + 0.7, shift + lead + 1.7)
            cells.append((cell, about, whole + rows))
        folders.append(record(tmp_path / corpus, *cells))
    table = wide(merge(folders)).set_index("arch")
    for corpus, value in (("sotu", 1.2), ("stdlib", 6.2)):
        column = f"{BITS}/{corpus}"
        assert table.at["mha", column] == pytest.approx(value)
        assert table.at["mha", f"{column}:low"] == pytest.approx(value, abs=0.01)
        assert table.at["gqa", f"{column}:high"] == pytest.approx(value + 0.1, abs=0.01)
