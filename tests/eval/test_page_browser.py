"""The page in a browser: on a phone, on a dark page, and with a filter that finds nothing."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from eval.cli.pages import write_page
from eval.report.leaderboard import merge
from eval.report.pictures.palette import DARK_PAPER, PAPER
from tests.eval.colour import contrast
from tests.eval.synthetic import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]
PHONE, TABLET = 390, 800

#: Opens the page in a frame of a width, waits for its charts and writes down what it sees.
PROBE = """<!doctype html><meta name="color-scheme" content="light dark"><body><script>
const frame = document.createElement("iframe");
frame.width = WIDTH; frame.height = 900; frame.srcdoc = PAGE;
document.body.append(frame);
const hex = (rgb) => "#" + rgb.match(/[\\d.]+/g).slice(0, 3)
  .map((n) => Number(n).toString(16).padStart(2, "0")).join("");
const clear = (colour) => colour === "none" || /^rgba.* 0\\)$/.test(colour);
function ground(element, view) {
  for (let at = element; at; at = at.parentElement) {
    const colour = view.getComputedStyle(at).backgroundColor;
    if (!clear(colour)) return hex(colour);
  }
}
function look() {
  const page = frame.contentDocument, view = frame.contentWindow;
  const charts = [...page.querySelectorAll(".chart")];
  const colours = (element) => {
    const style = view.getComputedStyle(element);
    return [style.fill, style.stroke].filter((c) => !clear(c)).map(hex);
  };
  const all = (query) => [...page.querySelectorAll(query)];
  const search = page.querySelector("input[type=search]");
  const filtered = (text) => {
    search.value = text;
    search.dispatchEvent(new Event("input"));
    const nothing = page.querySelector(".nothing");
    return nothing.hidden ? "" : nothing.textContent;
  };
  const outside = all("body *").filter((e) => !e.closest(".chart, .card"))
    .filter((e) => e.getBoundingClientRect().right > WIDTH).map((e) => e.tagName);
  const texts = all("main *").filter((e) => !e.closest(".chart, svg, script"))
    .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((e) => [e.tagName, hex(view.getComputedStyle(e).color), ground(e, view)]);
  return {
    width: page.documentElement.scrollWidth, outside, texts,
    charts: charts.map((c) => ({
      name: c.id, box: c.clientWidth, inside: c.scrollWidth, paper: ground(c, view),
      hinted: c.parentElement.classList.contains("scrolls"),
      labels: [...c.querySelectorAll("svg.marks text")].filter((t) => t.textContent)
        .filter((t) => !clear(view.getComputedStyle(t).fill) &&
          view.getComputedStyle(t).strokeWidth !== "3px")
        .map((t) => [t.textContent, ...colours(t).slice(0, 1)]),
      marks: [...c.querySelectorAll(".mark-symbol.role-mark path, .mark-line path")].map(colours),
      ticks: [...c.querySelectorAll(".role-axis-label text")].map((t) => t.textContent),
    })),
    nothing: filtered("no such thing"), something: filtered("gqa"),
  };
}
const wait = setInterval(() => {
  const charts = [...frame.contentDocument.querySelectorAll(".chart")];
  if (!charts.length || charts.some((c) => !c.querySelector("svg.marks"))) return;
  clearInterval(wait);
  setTimeout(() => {
    const pre = document.createElement("pre");
    pre.textContent = JSON.stringify(look());
    document.body.replaceChildren(pre);
  }, 500);
}, 100);
</script></body>"""


def seen(report: Path, folder: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """What a browser makes of the page at a width in pixels."""
    page = json.dumps(report.read_text()).replace("</", "<\\/").replace("<!--", "<\\!--")
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", page))
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1600,1000",
        "--virtual-time-budget=60000", "--dump-dom", probe.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-500:] + done.stderr[-500:]
    return dict(json.loads(unescape(found[1])))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_page(merge([write_run(folder, seeds=2)]), folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def phone(report: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return seen(report, tmp_path_factory.mktemp("phone"), width=PHONE)


@pytest.fixture(scope="module", params=[False, True], ids=["light", "dark"])
def scheme(
    request: pytest.FixtureRequest, report: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    found = seen(report, tmp_path_factory.mktemp("scheme"), width=1400, dark=request.param)
    return found | {"paper": DARK_PAPER if request.param else PAPER}


def test_a_phone_s_page_does_not_scroll_sideways(phone: dict[str, Any]) -> None:
    assert phone["width"] <= PHONE
    assert phone["outside"] == []


def test_a_phone_s_charts_scroll_in_their_boxes_and_say_so(phone: dict[str, Any]) -> None:
    for chart in phone["charts"]:
        assert chart["box"] < PHONE
        assert chart["inside"] > chart["box"] + 100
        assert chart["hinted"], chart["name"]


def test_a_tablet_shows_whole_charts(report: Path, tmp_path: Path) -> None:
    for chart in seen(report, tmp_path, width=TABLET)["charts"]:
        assert chart["inside"] == chart["box"], chart["name"]
        assert not chart["hinted"]


def test_all_text_can_be_read(scheme: dict[str, Any]) -> None:
    assert {chart["paper"] for chart in scheme["charts"]} == {scheme["paper"]}
    for tag, colour, paper in scheme["texts"]:
        assert contrast(colour, paper) >= 4.5, (tag, colour, paper)
    for chart in scheme["charts"]:
        # The cells of crossovers have their own grounds (tests/eval/test_palette.py).
        if chart["name"] == "crossings":
            continue
        for text, colour in chart["labels"]:
            assert contrast(colour, chart["paper"]) >= 4.5, (chart["name"], text, colour)


def test_all_marks_can_be_seen(scheme: dict[str, Any]) -> None:
    marked = 0
    for chart in scheme["charts"]:
        for colours in chart["marks"]:
            best = max(contrast(colour, chart["paper"]) for colour in colours)
            assert best >= 3, (chart["name"], colours)
            marked += 1
    assert marked > 100


def test_the_origin_of_an_axis_is_0(scheme: dict[str, Any]) -> None:
    ticks = {chart["name"]: chart["ticks"] for chart in scheme["charts"]}
    assert "0" in ticks["slope-state"]
    shown = [tick for of_chart in ticks.values() for tick in of_chart]
    assert not [tick for tick in shown if re.fullmatch(r"[+−-]?0[kMGm]", tick)]


def test_a_filter_without_hits_says_so(phone: dict[str, Any]) -> None:
    assert phone["nothing"] == "No architecture matches “no such thing”."
    assert phone["something"] == ""
