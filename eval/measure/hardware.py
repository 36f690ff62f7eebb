"""The measured rates of this machine."""

from eval.measure.cell_rows import roofline_rows
from eval.measure.progress import Watch
from eval.measure.site import Site
from eval.results.point import Point
from eval.results.rows import About, Found


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Bandwidth, matrix rate, products of as many rows as the point says, what a call costs."""
    found = site.roofline(point.options["rows"])
    dtype = str(found.dtype).removeprefix("torch.")
    return Found(about=About(dtype=dtype), rows=tuple(roofline_rows(found)))
