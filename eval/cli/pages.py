"""The report's page with predictions from its table: claims, and the cost at equal loss."""

from pathlib import Path

import pandas as pd

from archs.errors import UserError
from eval.predict.isoquality import iso_quality_cost
from eval.proof.claims import claims
from eval.report import page
from eval.results.ladder import long_enough, trained_sizes


def write_report(run_dir: Path) -> Path:
    """As `eval.report.page.write_report`."""
    return page.write_report(run_dir, told)


def write_page(long: pd.DataFrame, path: Path, by: str | None = None) -> None:
    """As `eval.report.page.write_page`."""
    page.write_page(long, path, told, by)


def told(long: pd.DataFrame) -> page.Told:
    """Costs need three trained sizes of two architectures."""
    points = trained_sizes(long)
    points = points[points["arch"].isin(long_enough(points))]
    archs = list(dict.fromkeys(points["arch"]))
    found = claims(long)
    if len(archs) < 2:
        return page.Told(found)
    reference = next((a for a in ("gqa", "mha") if a in archs), archs[0])
    try:
        return page.Told(found, iso_quality_cost(long[long["arch"].isin(archs)], reference))
    except UserError as why:
        return page.Told(found, no_costs=str(why))
