"""What all pictures share: axes whose pixels are known, labels that do not overlap, the look.

Knowing where a value lands in pixels lets labels be placed here, once, for the interactive page
and the PNG alike; a chart then draws them at ordinary data coordinates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, hypot, log10
from typing import Any, NamedTuple

import altair as alt
import numpy as np
from numpy.typing import NDArray

from eval.report.pictures.palette import FAINT, GRID, INK, PAPER, SOFT, TICK

FloatArray = NDArray[np.float64]
WIDTH, HEIGHT = 620, 400
FONT = "Inter, 'Liberation Sans', Arial, sans-serif"


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale with a known length: value to pixel and back. Vertical pixels run downwards."""

    low: float
    high: float
    pixels: int
    log: bool = True
    vertical: bool = False

    @classmethod
    def around(
        cls, values: Sequence[float], *, log: bool = True, vertical: bool = False, pad: float = 0.07
    ) -> "Axis":
        """An axis that holds the values with some room on both sides."""
        ends = [log10(v) if log else v for v in (min(values), max(values))]
        room = pad * (ends[1] - ends[0]) or (0.3 if log else 0.1 * abs(ends[0]) or 1.0)
        low, high = ends[0] - room, ends[1] + room
        if log:
            low, high = 10**low, 10**high
        return cls(low, high, HEIGHT if vertical else WIDTH, log, vertical)

    def pixel(self, value: float) -> float:
        """Where a value is drawn."""
        low, high, v = (log10(x) if self.log else x for x in (self.low, self.high, value))
        part = (v - low) / (high - low)
        return self.pixels * (1 - part if self.vertical else part)

    def value(self, pixel: float) -> float:
        """The value drawn at a pixel, inside or outside of the frame."""
        part = 1 - pixel / self.pixels if self.vertical else pixel / self.pixels
        if self.log:
            return float(self.low ** (1 - part) * self.high**part)
        return self.low + part * (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values for a log axis, few enough to read; none for a linear one."""
        if not self.log:
            return []
        decades = log10(self.high / self.low)
        steps = (1, 2, 3, 4, 5, 7) if decades < 1.2 else (1, 2, 5) if decades < 3 else (1,)
        powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        values = [step * 10.0**power for power in powers for step in steps]
        return [value for value in values if self.low <= value <= self.high]

    @property
    def scale(self) -> alt.Scale:
        """The scale of a channel."""
        kind: Any = "log" if self.log else "linear"
        return alt.Scale(type=kind, domain=[self.low, self.high], nice=False, zero=False)


class Label(NamedTuple):
    """An architecture's name and an addition, where left edge and middle are in data units."""

    arch: str
    x: float
    y: float
    from_x: float
    from_y: float
    more: str = ""

    @property
    def text(self) -> str:
        """What is drawn."""
        return f"{self.arch} {self.more}" if self.more else self.arch


LINE = 14
CHAR = 6.3


def end_labels(points: Mapping[str, tuple[float, float]], x: Axis, y: Axis) -> list[Label]:
    """Labels right of the frame for curves that end at `points`, moved apart vertically."""
    order = sorted(points, key=lambda name: y.pixel(points[name][1]))
    wanted = [y.pixel(points[name][1]) for name in order]
    right = x.value(x.pixels + 26)
    return [
        Label(name, right, y.value(at), *points[name])
        for name, at in zip(order, spread(wanted, LINE, y.pixels), strict=True)
    ]


def spread(wanted: Sequence[float], gap: float, length: float) -> list[float]:
    """The ascending positions nearest to `wanted` (ascending) that keep `gap`.

    Neighbours that are too close become one block around their mean; blocks are merged until
    none touch, then kept within 0..length where there is room.
    """
    blocks: list[list[float]] = []
    for at in wanted:
        blocks.append([at])
        while len(blocks) > 1 and _start(blocks[-1], gap) < _end(blocks[-2], gap) + gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = [_start(block, gap) + i * gap for block in blocks for i in range(len(block))]
    for i, at in enumerate(placed):
        placed[i] = max(at, i * gap)
    for i in range(len(placed) - 1, -1, -1):
        room = length - (len(placed) - 1 - i) * gap
        placed[i] = min(placed[i], max(room, i * gap))
    return placed


def _start(block: Sequence[float], gap: float) -> float:
    return sum(block) / len(block) - (len(block) - 1) * gap / 2


def _end(block: Sequence[float], gap: float) -> float:
    return _start(block, gap) + (len(block) - 1) * gap


def point_labels(
    points: Mapping[str, tuple[float, float]],
    x: Axis,
    y: Axis,
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[Label]:
    """Labels beside scattered points, each at the nearest free place around its own.

    Tries rings of growing distance; a place is free where it covers no point, no other label,
    none of the `lines`, and stays in the frame.
    """
    pixels = {name: (x.pixel(px), y.pixel(py)) for name, (px, py) in points.items()}
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py in pixels.values()]
    for line in lines:
        corners = [(x.pixel(px), y.pixel(py)) for px, py in line]
        for (ax, ay), (bx, by) in pairwise(corners):
            steps = max(1, ceil(hypot(bx - ax, by - ay) / 4))
            on = [(ax + (bx - ax) * i / steps, ay + (by - ay) * i / steps) for i in range(steps)]
            taken += [(px - 1, py - 1, px + 1, py + 1) for px, py in on]
    labels = []
    for name in sorted(points, key=lambda name: pixels[name]):
        px, py = pixels[name]
        size = CHAR * len(name)
        best, least = (0.0, 0.0, 0.0, 0.0), float("inf")
        walls = np.array(taken)
        for ring in (9, 16, 26, 38, 52, 68, 86, 106, 128):
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
                left = px + dx * ring - (size if dx < 0 else size / 2 if dx == 0 else 0)
                middle = py + dy * ring
                box = (left, middle - LINE / 2, left + size, middle + LINE / 2)
                outside = min(0, left, middle - 8, x.pixels - box[2], y.pixels - middle - 8)
                cost = 10 * _covered(box, walls) - 100 * outside + ring
                if cost < least:
                    best, least = box, cost
        taken.append((best[0] - 5, best[1], best[2] + 5, best[3]))
        labels.append(
            Label(name, x.value(best[0]), y.value((best[1] + best[3]) / 2), *points[name])
        )
    return labels


def _covered(box: tuple[float, ...], walls: FloatArray) -> float:
    """Square pixels of the walls under a box; both as left, top, right, bottom."""
    left, top, right, bottom = walls.T
    width = np.minimum(right, box[2]) - np.maximum(left, box[0])
    height = np.minimum(bottom, box[3]) - np.maximum(top, box[1])
    return float((width.clip(0) * height.clip(0)).sum())


def themed(chart: alt.LayerChart | alt.Chart, title: str, *subtitle: str) -> alt.LayerChart:
    """The chart with its title and this project's look."""
    layered = chart if isinstance(chart, alt.LayerChart) else alt.layer(chart)
    heading = alt.TitleParams(title, subtitle=[line for line in subtitle if line])
    return (
        layered.properties(title=heading, width=WIDTH, height=HEIGHT)
        .configure(font=FONT, background=PAPER, padding=12)
        .configure_title(
            anchor="start", fontSize=15, fontWeight=600, color=INK, offset=14,
            subtitleFontSize=12, subtitleColor=SOFT, subtitlePadding=5,
        )
        .configure_axis(
            labelColor=TICK, titleColor=INK, titleFontWeight=500, titleFontSize=12,
            labelFontSize=11, gridColor=GRID, domainColor=FAINT, tickColor=FAINT,
            titlePadding=8,
        )
        .configure_view(stroke=FAINT)
        .configure_legend(labelFontSize=11, labelColor=INK, rowPadding=3, offset=18)
    )  # fmt: skip
