"""The measured rates of this machine."""

from eval.cell_rows import roofline_rows
from eval.measure.site import Site
from eval.progress import Watch
from eval.results.point import Point
from eval.results.rows import About, Found


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Bandwidth, matrix rate and what a call costs."""
    dtype = str(site.roofline.dtype).removeprefix("torch.")
    return Found(about=About(dtype=dtype), rows=tuple(roofline_rows(site.roofline)))
