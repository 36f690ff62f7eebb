"""The report of a run: one HTML file that needs nothing else, its pictures and its leaderboard.

The page holds the chart library once and all data, loads nothing (its own content policy forbids
it), and works from a disk years later. It needs only `results.csv`, so it need not be written
where the measuring was done.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import pandas as pd
import vl_convert

from archs.errors import UserError
from archs.files import make_folder, read_text, refusing, write
from eval.report.evidence import Claim
from eval.report.kernels import kernel_section
from eval.report.leaderboard import BY_ROW, headlines, merge, rank, wide
from eval.report.pictures.palette import NIGHT, SHAPES, Look, Palette
from eval.report.pictures.plans import Picture, pictures
from eval.report.verdict import verdict
from eval.results.measures import MEASURES

TEMPLATE = Path(__file__).with_name("page.html")
#: vl-convert carries several Vega-Lite versions: the page and the PNGs use the charts' own.
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.split(".")[:2])


class Told(NamedTuple):
    """What a page adds to its table: predictions.

    costs: rows of `iso_quality_cost`; no_costs: why there are none.
    """

    claims: Sequence[Claim]
    costs: Sequence[Mapping[str, object]] = ()
    no_costs: str = ""


#: What to tell of a table.
Tell = Callable[[pd.DataFrame], Told]


def write_report(run_dir: Path, tell: Tell) -> Path:
    """Write `report.html`, `leaderboard.csv` and `plots/` into a run folder; the page's path.

    Raises UserError when there is no `results.csv`, when it holds no architecture, and when the
    disk refuses.
    """
    source = run_dir / "results.csv"
    if not source.is_file():
        raise UserError(f"'{source}' does not exist; name a run folder, or run a suite first")
    long = merge([source])
    table = rank(wide(long))
    drawn = _drawn(long)
    config = run_dir / "config.toml"
    text = read_text(config) if config.is_file() else ""
    name, kernels = run_dir.resolve().name, kernel_section(run_dir)
    page = _page(name, long, table, drawn, tell(long), text, kernels)
    report = run_dir / "report.html"
    write(run_dir / "leaderboard.csv", table.to_csv(index=False))
    _write_plots(run_dir / "plots", drawn)
    write(report, page)
    return report


def write_page(long: pd.DataFrame, path: Path, tell: Tell, by: str | None = None) -> None:
    """The same page for the long table of several runs, ranked by a column as `rank` does.

    Raises UserError when the disk refuses, or `by` is no figure of the table.
    """
    write(path, _page(path.stem, long, rank(wide(long), by), _drawn(long), tell(long), ""))


#: Pictures with their charts as Vega-Lite; None where a picture could not be drawn.
Drawn = list[tuple[Picture, dict[str, Any] | None]]


def _drawn(long: pd.DataFrame) -> Drawn:
    with alt.data_transformers.enable("default", max_rows=None):
        return [(p, None if p.chart is None else p.chart.to_dict()) for p in pictures(long)]


def _write_plots(folder: Path, drawn: Drawn) -> None:
    """Each chart as SVG and as PNG at twice its size; pictures no longer drawn are removed."""
    make_folder(folder)
    specs = {picture.name: spec for picture, spec in drawn if spec is not None}
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        if old.stem not in specs:
            with refusing(old, "removed"):
                old.unlink()
    for name, spec in specs.items():
        svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
        write(folder / f"{name}.svg", svg)
        write(folder / f"{name}.png", vl_convert.svg_to_png(svg, scale=2))


def _page(
    name: str, long: pd.DataFrame, table: pd.DataFrame, drawn: Drawn, told: Told, config: str,
    kernels: str = "",
) -> str:  # fmt: skip
    sections = {
        "leaderboard": ("Leaderboard", _leaderboard(table)),
        "pictures": ("Pictures", _pictures(drawn)),
        "kernels": ("Kernels", kernels),
        "claims": ("What the textbook claims", _claims(told.claims)),
        "isoquality": ("What equal loss costs", _isoquality(told)),
        "not-measured": ("Not measured", _missing(drawn)),
        "failures": ("Failed cells", _failures(long)),
        "provenance": ("Where the figures come from", _provenance(long, config)),
        "measures": ("What the measures mean", _definitions(long)),
    }
    shown = {key: section for key, section in sections.items() if section[1]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in shown.items())
    parts = [f'<h2 id="{key}">{title}</h2>\n{body}' for key, (title, body) in shown.items()]
    hardware = ", ".join(h for h in dict.fromkeys(long["hardware"]) if h)
    lead = f"{len(table)} architectures, one harness, on {escape(hardware)}."
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict(long, table))
    head = (
        f'<h1>decodebench: {escape(name)}</h1>\n<p class="lead">{lead}</p>\n'
        f'<div class="verdict">{said}</div>\n<nav>{links}</nav>'
    )
    foot = (
        "<footer>Every figure is a row of results.csv; the wide table is leaderboard.csv.</footer>"
    )
    content = {
        "title": f"decodebench: {escape(name)}",
        "body": "\n".join([head, *parts, foot]),
        "night": json.dumps(NIGHT),
        "bundle": _library(),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: content[mark[1]], template)


@cache
def _library() -> str:
    """The chart library as one script; bundling it takes seconds."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    # The end of a script element inside of the library's own strings would end ours.
    return bundle.replace("</script", "<\\/script")


def _leaderboard(table: pd.DataFrame) -> str:
    shown = headlines(table)
    looks = Palette.of(table["arch"], dict(zip(table["arch"], table["family"], strict=True))).looks
    heads = [_head("rank"), _head("architecture", kind="text name"), _head("family", kind="text")]
    heads += [_head(h.title, h.where) for h in shown]
    heads.append(_head("status", kind="text"))
    rows = []
    for place, (_, row) in enumerate(table.iterrows(), 1):
        arch = str(row["arch"])
        cells = [
            _cell(escape(str(row["rank"])) or "–", str(place), "rank"),
            _cell(_swatch(looks[arch]) + escape(arch), arch, "text name"),
            _cell(escape(str(row["family"])), str(row["family"]), "text"),
        ]
        for headline in shown:
            value = row[headline.column]
            missing = pd.isna(value)
            text = escape(headline.text(row))
            failed = "failed" if missing and text != "–" else ""
            cells.append(_cell(text, "" if missing else repr(float(value)), failed))
        status = str(row["status"])
        pill = "ok" if status == "ok" else f'<span class="pill">{escape(status)}</span>'
        cells.append(_cell(pill, status, "text"))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        "A rank is a range: from one more than the architectures that are ahead to all but those "
        "that are behind, by a test of each pair that is corrected for all pairs, so that chance "
        "alone makes a rank in at most 5 % of tables. ± is the 95 % interval of one figure: over "
        "seeds, or with one seed over the documents that all models share. "
        if (table["rank"] != "").any()
        else "Without intervals of what it is sorted by there is no rank. "
    )
    note += "Under each title stands where its figure was taken. Click a title to sort."
    search = '<input type="search" placeholder="filter" aria-label="filter the leaderboard">'
    none = '<p class="soft nothing" role="status" hidden></p>'
    return f'<p class="soft">{note}</p>\n{search}\n{none}\n{_table(heads, rows)}'


def _swatch(look: Look) -> str:
    """The mark that stands for an architecture in the pictures."""
    return (
        '<svg class="swatch" viewBox="-1.3 -1.3 2.6 2.6" aria-hidden="true"><path '
        f'd="{SHAPES[look.shape]}" style="--day:{look.colour};--night:{NIGHT[look.colour]}"/></svg>'
    )


def _pictures(drawn: Drawn) -> str:
    figures = []
    for picture, spec in drawn:
        if spec is None:
            continue
        data = json.dumps(spec, allow_nan=False).replace("</", "<\\/")
        key = escape(picture.name, quote=True)
        figures.append(
            f'<figure>\n<div class="chart" id="{key}" data-spec="{key}-spec"></div>\n'
            f'<script type="application/json" id="{key}-spec">{data}</script>\n'
            f"<figcaption><b>How to read this</b> {escape(picture.how_to_read)}</figcaption>\n"
            "</figure>"
        )
    return "\n".join(figures)


def _claims(claims: Sequence[Claim]) -> str:
    rows = []
    for claim in claims:
        verdict = escape(claim.verdict)
        cells = [
            _cell(str(claim.number), str(claim.number)),
            _cell(escape(claim.text), claim.text, "text wrap"),
            _cell(verdict, verdict, "text failed" if claim.verdict == "refuted" else "text"),
            _cell(escape(claim.evidence), claim.evidence, "text wrap"),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [_head("no.")] + [_head(n, kind="text") for n in ("claim", "verdict", "evidence")]
    return _table(heads, rows)


def _isoquality(told: Told) -> str:
    """The section on cost at equal loss, at one deployment shape."""
    if told.no_costs:
        return f'<p class="soft">No answer: {escape(told.no_costs)}.</p>'
    if not told.costs:
        return ""
    reference = str(told.costs[0]["reference"])
    rows = []
    for row in told.costs:
        ratio = f"{row['size_ratio']:.2f}"
        if row["size_ratio_low"] is not None:
            ratio += f" ({row['size_ratio_low']:.2f}–{row['size_ratio_high']:.2f})"
        arch = str(row["arch"])
        cells = [_cell(escape(arch), arch, "text"), _cell(ratio, repr(row["size_ratio"]))]
        for name, digits in (("tpot_ms", 2), ("output_tok_per_s", 0), ("state_bytes", 0)):
            value = float(str(row[name]))
            cells.append(_cell(f"{value:,.{digits}f}", repr(value)))
        most = row["max_sequences"]
        text = "all" if most is None else f"{most:,}"
        cells.append(_cell(text, str(most), "" if row["fits"] else "failed"))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = (
        f"How many times {escape(reference)}'s parameters each needs for {escape(reference)}'s "
        "loss, by one fit to all sizes (95 % interval), and what a decode step then "
        f"takes by the roofline: {row['scale']} shapes of that depth, {row['hardware']}, batch "
        f"{row['batch']}, {row['context']:,} tokens (where fewer sequences fit in memory, it is "
        f"what such a step would take). {escape(str(row['note']))}"
    )
    heads = [_head("architecture", kind="text"), _head("parameters needed", "ratio")]
    heads += [_head("TPOT ms"), _head("token/s"), _head("state bytes", "a sequence")]
    heads += [_head("sequences", "that fit")]
    return f'<p class="soft">{note}</p>\n{_table(heads, rows)}'


def _missing(drawn: Drawn) -> str:
    items = [f"<li>{escape(p.title)}: {escape(p.missing)}.</li>" for p, _ in drawn if not p.chart]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _failures(long: pd.DataFrame) -> str:
    failed = long[long["status"] != "ok"]
    if failed.empty:
        return ""
    names = ("arch", "stage", "scale", "seed", "batch", "context", "status", "note")
    rows = []
    for _, row in failed.iterrows():
        texts = ["" if pd.isna(row[n]) else str(row[n]) for n in names]
        kinds = ["text"] * 3 + [""] * 3 + ["text failed", "text wrap"]
        cells = [_cell(escape(t), t, k) for t, k in zip(texts, kinds, strict=True)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [_head(n, kind="" if n in ("seed", "batch", "context") else "text") for n in names]
    return _table(heads, rows)


def _provenance(long: pd.DataFrame, config: str) -> str:
    facts = []
    for name in ("arch", "scale", "tokens", *BY_ROW):
        if name not in long:
            continue
        values = [str(v) for v in dict.fromkeys(long[name]) if not pd.isna(v) and v != ""]
        if not values:
            continue
        more = f" and {len(values) - 16} more" if len(values) > 16 else ""
        text = escape(", ".join(values[:16]) + more)
        facts.append(f"<div><dt>{name}</dt><dd>{text}</dd></div>")
    shown = f'<div class="card"><dl class="facts">{"".join(facts)}</dl></div>'
    if config:
        shown += (
            '\n<details class="card" style="margin-top:12px"><summary>config.toml</summary>'
            f"<pre>{escape(config)}</pre></details>"
        )
    return shown


def _definitions(long: pd.DataFrame) -> str:
    seen = set(long["measure"])
    rows = [
        f"<tr>{_cell(f'<code>{name}</code>', name, 'text')}"
        f"{_cell(escape(measure.unit), measure.unit, 'text')}"
        f"{_cell(measure.better or '', measure.better or '', 'text')}"
        f"{_cell(escape(measure.meaning), measure.meaning, 'text wrap')}</tr>"
        for name, measure in MEASURES.items()
        if name in seen
    ]
    heads = [_head(n, kind="text") for n in ("measure", "unit", "better", "meaning")]
    return _table(heads, rows)


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    return (
        f'<div class="card"><table><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _head(title: str, where: str = "", kind: str = "") -> str:
    small = f"<small>{escape(where)}</small>" if where else ""
    return f'<th scope="col" class="{kind}"><button>{escape(title)}</button>{small}</th>'


def _cell(content: str, sort: str, kind: str = "") -> str:
    """`content` is HTML, `sort` plain text to sort by; empty sorts last."""
    return f'<td class="{kind}" data-sort="{escape(sort, quote=True)}">{content}</td>'
