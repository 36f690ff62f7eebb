"""The report: one page that loads nothing, says everything, and trusts no name."""

import json
import os
import re
import shutil
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import pandas as pd
import pytest

from archs.errors import UserError
from eval.cli.pages import write_page, write_report
from eval.report.leaderboard import merge, wide
from eval.report.pictures.palette import NIGHT, SHAPES, Palette
from eval.report.pictures.plans import PLANS
from eval.results.point import Point
from eval.results.rows import CELL_FAILED, About, Row, Status
from tests.eval.page import Page
from tests.eval.synthetic import ARCHS, CONTEXTS, KEPT, LADDER, PACKED, write_run
from tests.eval.test_leaderboard import record, scored, timed

#: Attributes by which a page loads or leaves to something else.
LOADING = {
    "src",
    "srcset",
    "href",
    "data",
    "poster",
    "action",
    "formaction",
    "background",
    "xlink:href",
}
HOSTILE = "<img src=http://evil/x onerror=alert(1)></script><script>alert(2)</script>\"'&.py"


def stepped(arch: str, tpot_ms: dict[int, float]) -> tuple[Point, About, list[Row]]:
    """Latencies by context with the same times predicted."""
    rows = [
        Row(measure=measure, value=ms, context=context)
        for context, ms in tpot_ms.items()
        for measure in ("tpot_ms", "tpot_pred_ms")
    ]
    return Point(arch=arch, stage="decode", scale="70m", batch=1), About(), rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of thirteen architectures with failures, reported."""
    made = write_run(tmp_path_factory.mktemp("report") / "my run", seeds=2)
    (made / "config.toml").write_text('# config_hash = c0ffee\nname = "my <suite>"\n')
    write_report(made)
    return made


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "report.html")


# -- the page --


def test_the_page_loads_nothing(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "iframe", "object", "embed", "base", "img", "form", "video", "audio"}
    for tag, attributes in page.elements:
        for name in LOADING & set(attributes):
            assert str(attributes[name]).startswith("#"), (tag, name, attributes[name])
    for style in page.styles:
        assert "url(" not in style
        assert "@import" not in style
    for chart in page.charts.values():
        assert not re.search(r'"(url|href)":', json.dumps(chart))


def test_the_browser_is_told_to_load_nothing(page: Page) -> None:
    (policy,) = (a["content"] for tag, a in page.elements if a.get("http-equiv"))
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    assert rules["default-src"] == "'none'"
    for sources in rules.values():
        assert set(sources.split()) <= {
            "'none'",
            "'unsafe-inline'",
            "'unsafe-eval'",
            "data:",
            "blob:",
        }


def test_every_architecture_is_in_the_table_and_in_each_picture(page: Page) -> None:
    for arch in ARCHS:
        assert arch in page.texts
    for name, chart in page.charts.items():
        shown = {v for data in chart["datasets"].values() for row in data for v in row.values()}
        partly = dict.fromkeys(("bits-loss", "time-bytes", "pruned-loss"), PACKED)
        partly["ladder"] = LADDER
        partly |= {
            f"bits-{name}": tuple(arch for arch in KEPT if KEPT[arch] in kinds)
            for name, kinds in (
                ("rows", ("kv",)), ("memory", ("memory",)), ("position", ("memory",)),
                ("recall", ("kv", "memory")), ("recall-state", ("kv", "memory")),
            )
        }  # fmt: skip
        assert set(partly.get(name, ARCHS)) <= shown, name


def test_every_picture_is_drawn_and_explained(page: Page) -> None:
    assert list(page.charts) == list(PLANS)
    for plan in PLANS.values():
        assert plan.how_to_read[:60] in page.text
    assert "Not measured" not in page.text
    assert "vegaEmbed" in page.source


def test_failed_cells_say_why(page: Page) -> None:
    assert "32 sequences of 16384 tokens need 34.4 GB, 12.1 GB are free" in page.text
    assert "oom ×1" in page.text
    assert "incorrect ×1" in page.text


def test_the_page_says_where_its_figures_come_from(page: Page) -> None:
    for fact in (
        "AMD EPYC 7763",
        "2.13.0+cpu",
        "0123456789ab",
        "2026-01-02",
        'name = "my <suite>"',
    ):
        assert fact in page.text, fact


def test_the_verdict_stands_at_the_top(page: Page) -> None:
    marked = (tag for tag, a in page.elements if tag == "table" or a.get("class") == "verdict")
    assert next(marked) == "div"
    assert "In quality gdn:gqa=3:1" in page.text
    assert "1.05 MB of state in linear, 1.07 GB in mha, 1,024 times as much" in page.text


def test_the_table_shows_each_architecture_s_mark(page: Page) -> None:
    marks = [a for tag, a in page.elements if tag == "path"]
    looks = Palette.of(ARCHS).looks
    colours = [str(a["style"]) for a in marks]
    assert sorted(colours) == sorted(
        f"--day:{look.colour};--night:{NIGHT[look.colour]}" for look in looks.values()
    )
    assert {a["d"] for a in marks} == {SHAPES[look.shape] for look in looks.values()}


def test_equal_loss_is_answered_for_a_ladder(page: Page) -> None:
    assert "What equal loss costs" in page.text
    assert "1b shapes of that depth, h100, batch 64, 16,384 tokens" in page.text


# -- the pictures --


@pytest.mark.parametrize("name", PLANS)
def test_a_picture_is_written_twice_and_shows_something(folder: Path, name: str) -> None:
    svg = ElementTree.parse(folder / "plots" / f"{name}.svg").getroot()
    size = [float(svg.attrib[side]) for side in ("width", "height")]
    assert "".join(svg.itertext()).count("gqa") >= 1
    png = (folder / "plots" / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", png[16:24]) == pytest.approx([2 * side for side in size], abs=2)
    assert len(set(pixels_of(png))) > 50


def pixels_of(png: bytes) -> bytes:
    """The filtered scan lines of a PNG."""
    at, packed = 8, b""
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            packed += png[at + 8 : at + 8 + length]
        at += 12 + length
    return zlib.decompress(packed)


def test_latencies_are_drawn_where_they_were_measured(page: Page) -> None:
    chart = page.charts["tpot-context"]
    contexts = {
        row["context"] for data in chart["datasets"].values() for row in data if "tpot_ms" in row
    }
    assert contexts == set(CONTEXTS)


def test_loss_by_position_is_drawn_without_what_all_share(page: Page, folder: Path) -> None:
    """Text that is hard at one position moves all curves alike, and must not be seen."""
    (rows,) = (
        data
        for data in page.charts["loss-position"]["datasets"].values()
        if "difference" in data[0]
    )
    drawn = pd.DataFrame(rows)
    assert drawn.groupby("position")["difference"].mean().abs().max() < 1e-9
    table = pd.read_csv(folder / "results.csv", keep_default_na=False)
    measured = table[(table["measure"] == "loss_at_position") & (table["arch"] == "mamba1")]
    measured = measured.astype({"value": float, "position": int})
    mine = drawn[drawn["arch"] == "mamba1"].set_index("position")
    raw = measured.groupby("position")["value"].mean()
    assert mine["loss"].to_dict() == pytest.approx(raw.to_dict())
    everyone = drawn.groupby("position")["loss"].mean()
    assert mine["difference"].to_dict() == pytest.approx((raw - everyone).to_dict())
    subtitle = page.charts["loss-position"]["title"]["subtitle"]
    assert f"mean over 13 architectures, in nat/token: {everyone[8]:.2f} at 8" in subtitle[1]
    assert f"{everyone[128]:.2f} at 128, {everyone[256]:.2f} at 256 tokens" in subtitle[1]


def test_the_leaderboard_is_the_wide_table(folder: Path) -> None:
    table = pd.read_csv(folder / "leaderboard.csv")
    assert list(table.columns[:4]) == ["rank", "arch", "family", "pattern"]
    assert set(table["arch"]) == set(ARCHS)


# -- what may be missing --


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the chart library, whose bundling takes longer than all else here."""
    monkeypatch.setattr("eval.report.page.vl_convert.javascript_bundle", lambda *_: "")


@pytest.mark.usefixtures("no_library")
def test_a_single_architecture_with_a_single_figure(tmp_path: Path) -> None:
    page = Page(write_report(record(tmp_path, timed("gqa", 1.25))))
    assert "gqa" in page.texts
    assert page.charts == {}
    for plan in PLANS.values():
        assert f"{plan.title}: not measured: it needs {plan.needs}." in page.text


@pytest.mark.usefixtures("no_library")
def test_what_is_declared_needs_no_timing(tmp_path: Path) -> None:
    """Trained models and their declared state, as after a run that was stopped before decoding."""
    whole = write_run(tmp_path, seeds=2)
    table = pd.read_csv(whole / "results.csv", keep_default_na=False)
    table[table["stage"] != "decode"].to_csv(whole / "results.csv", index=False)
    page = Page(write_report(whole))
    assert {"quality-state", "sequences", "intensity", "loss-position"} <= page.charts.keys()
    assert not {"tpot-context", "throughput-latency", "roofline"} & page.charts.keys()


@pytest.mark.usefixtures("no_library")
def test_crossings_without_a_crossing_are_not_drawn(tmp_path: Path) -> None:
    cells = [stepped("gqa", {256: 1.0, 1024: 1.1}), stepped("mha", {256: 2.0, 1024: 4.0})]
    page = Page(write_report(record(tmp_path, *cells)))
    assert "tpot-context" in page.charts
    assert "crossings" not in page.charts
    assert (
        "Crossovers: no two of 2 architectures cross, timed from 256 to 1,024 tokens, batch 1 "
        "(70m shapes · AMD EPYC" in page.text
    )


@pytest.mark.usefixtures("no_library")
def test_crossings_say_who_is_left_out(tmp_path: Path) -> None:
    cells = [
        stepped("gqa", {256: 1.0, 1024: 3.0}), stepped("mha", {256: 2.0, 1024: 2.5}),
        stepped("mla", {256: 1.0}),
    ]  # fmt: skip
    page = Page(write_report(record(tmp_path, *cells)))
    subtitle = page.charts["crossings"]["title"]["subtitle"]
    assert subtitle[-1] == "left out, as not timed at all of these: mla"


@pytest.mark.usefixtures("no_library")
def test_crossings_of_nothing_common_say_so(tmp_path: Path) -> None:
    cells = [stepped("gqa", {256: 1.0, 1024: 3.0}), stepped("mha", {512: 2.0, 2048: 2.5})]
    page = Page(write_report(record(tmp_path, *cells)))
    assert "Crossovers: no two architectures were timed at the same contexts" in page.text


@pytest.mark.usefixtures("no_library")
def test_the_page_of_several_runs_has_a_verdict_too(tmp_path: Path) -> None:
    cells = [timed("gqa", 1.25), timed("mha", 3.5)]
    write_page(merge([record(tmp_path, *cells)]), tmp_path / "page.html")
    said = "At 256 tokens gqa decodes fastest: 1.25 ms against 3.5 ms of mha, the slowest"
    assert said in Page(tmp_path / "page.html").text


@pytest.mark.usefixtures("no_library")
def test_the_page_of_several_runs_is_sorted_by_the_column_that_was_named(tmp_path: Path) -> None:
    long = merge([record(tmp_path, timed("gqa", 1.25), timed("mha", 3.5), timed("mla", 2.0))])
    [column] = [c for c in wide(long) if str(c).startswith("tpot_ms@") and ":" not in str(c)]
    write_page(long, tmp_path / "page.html", column)
    texts = Page(tmp_path / "page.html").texts
    places = [texts.index(arch) for arch in ("gqa", "mla", "mha")]
    assert places == sorted(places)
    with pytest.raises(UserError, match="'nothing' is not a figure to rank by"):
        write_page(long, tmp_path / "page.html", "nothing")


@pytest.mark.usefixtures("no_library")
def test_one_architecture_s_loss_by_position_is_drawn_as_it_is(tmp_path: Path) -> None:
    rows = [Row(measure="loss_at_position", value=3.0 - p / 100, position=p) for p in (8, 64)]
    rows.append(Row(measure="bits_per_byte", value=2.0, context=32))
    cell = Point(arch="gqa", stage="train", scale="tiny", seed=0)
    page = Page(write_report(record(tmp_path, (cell, About(), rows))))
    shown = [row for data in page.charts["loss-position"]["datasets"].values() for row in data]
    assert {row["loss"] for row in shown if "loss" in row} >= {2.92, 2.36}
    assert not [row for row in shown if "difference" in row]


@pytest.mark.usefixtures("no_library")
def test_a_lone_figure_of_quality_has_no_rank(tmp_path: Path) -> None:
    page = Page(write_report(record(tmp_path, scored("gqa", None, None))))
    assert "gqa" in page.texts
    assert pd.read_csv(tmp_path / "leaderboard.csv")["rank"].isna().all()


@pytest.mark.usefixtures("no_library")
def test_nothing_but_failures(tmp_path: Path) -> None:
    failed = [Row(measure=CELL_FAILED, status=Status.ERROR, note="no <luck> & more")]
    cell = Point(arch="gqa", stage="decode", scale="70m", batch=1)
    page = Page(write_report(record(tmp_path, (cell, About(), failed))))
    assert "no <luck> & more" in page.texts
    assert "luck" not in {tag for tag, _ in page.elements}


@pytest.mark.usefixtures("no_library")
def test_pictures_that_are_no_longer_drawn_go(tmp_path: Path, folder: Path) -> None:
    record(tmp_path, timed("gqa", 1.25))
    shutil.copytree(folder / "plots", tmp_path / "plots")
    (tmp_path / "plots" / "notes.txt").write_text("mine")
    write_report(tmp_path)
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("no_library")
def test_hostile_names_stay_text(tmp_path: Path) -> None:
    rows = [Row(measure="tpot_ms", value=1.0 + c / 1e4, context=c) for c in (256, 1024)]
    cell = Point(arch=HOSTILE, stage="decode", scale="70m", batch=1)
    page = Page(write_report(record(tmp_path, (cell, About(pattern=HOSTILE), rows))))
    assert HOSTILE in page.texts
    assert "img" not in {tag for tag, _ in page.elements}
    assert not [a for _, a in page.elements if "onerror" in a]
    assert not [text for _, text in page.scripts if text.startswith("alert")]
    data = page.charts["tpot-context"]["datasets"].values()
    assert HOSTILE in {row.get("arch") for rows in data for row in rows}


def test_the_library_cannot_end_its_own_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = 'const text = "</script><img src=x>";'
    monkeypatch.setattr("eval.report.page.vl_convert.javascript_bundle", lambda *_: library)
    page = Page(write_report(record(tmp_path, timed("gqa", 1.25))))
    assert "img" not in {tag for tag, _ in page.elements}


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("at", ["leaderboard.csv", "report.html"])
def test_a_full_disk_keeps_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    write_report(record(tmp_path, timed("gqa", 1.25)))
    before = (tmp_path / at).read_bytes()
    honest = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == at:
            raise OSError(28, "No space left on device")
        honest(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_report(tmp_path)
    assert (tmp_path / at).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
