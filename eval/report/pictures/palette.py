"""Colours and point shapes: one look for each architecture, on light and on dark pages alike.

A look follows from the name alone, so an architecture looks the same on every page. Members of a
family share a hue; families that are alike to eyes without green cones have different shapes, so
no two looks are alike in both. Charts are written in the colours of a light page; `NIGHT` says
what each of them becomes on a dark one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple
from zlib import crc32

import altair as alt

from eval.results.families import KNOWN, Family, known_family

#: The backgrounds of charts, by day and by night.
PAPER, DARK_PAPER = "#ffffff", "#1c2026"
INK, SOFT, TICK, RULE = "#30343b", "#667080", "#4d5563", "#7d8592"
FAINT, GRID = "#c9ced6", "#eceff3"
#: The cells of the table of crossovers.
VERDICTS = {
    "always": "#9fd8ad", "from": "#d3eed9", "equal": "#e6eaef", "until": "#f9e3c4", "never": PAPER,
}  # fmt: skip

#: Each family's shades by day and by night. On paper of their own kind all can be read as text.
HUES: dict[Family, tuple[tuple[str, str], ...]] = {
    "softmax": (("#0855aa", "#91adfe"), ("#2674dd", "#4988f4"), ("#013875", "#c9d3ff")),
    "latent": (("#7e369e", "#de91fe"), ("#a156c0", "#b76bd7"), ("#5c127c", "#f0c6ff")),
    "window": (("#814a00", "#ee9e47"), ("#ab6508", "#c37923"), ("#563101", "#ffca9b")),
    "recurrent": (("#006531", "#5ec37e"), ("#168747", "#349d5b"), ("#01431f", "#9be5ae")),
    "hybrid": (("#b00327", "#fe908a"), ("#db3541", "#f54e53"), ("#790318", "#fec7c2")),
    "unknown": (("#54575d", "#acafb6"), ("#72767c", "#878b91"), ("#363a3f", "#d2d4da")),
}
#: Outlines in the square from -1 to 1, as SVG paths.
SHAPES = {
    "circle": "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",
    "square": "M-.9,-.9H.9V.9H-.9Z",
    "triangle": "M0,-1L1,.8H-1Z",
    "diamond": "M0,-1.15L1.15,0L0,1.15L-1.15,0Z",
    "triangle-down": "M0,1L1,-.8H-1Z",
    "cross": "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z",
    "star": "M0,-1.2L.3,-.4L1.15,-.37L.48,.15L.7,.97L0,.5L-.7,.97L-.48,.15L-1.15,-.37L-.3,-.4Z",
    "hourglass": "M-1,-1H1L.25,0L1,1H-1L-.25,0Z",
    "plus": "M-.35,-1.1H.35V-.35H1.1V.35H.35V1.1H-.35V.35H-1.1V-.35H-.35Z",
    "bar": "M-.4,-1.2H.4V1.2H-.4Z",
}
_OPEN = ("circle", "square", "triangle", "diamond")
_CLOSED = ("triangle-down", "cross", "star", "hourglass")
#: Softmax and latent are alike without green cones, and so are window, recurrent and hybrid.
FORMS: dict[Family, tuple[str, ...]] = {
    "softmax": _OPEN,
    "latent": _CLOSED,
    "window": ("plus", "bar"),
    "recurrent": _OPEN,
    "hybrid": _CLOSED,
    "unknown": tuple(SHAPES),
}

#: What each colour of a chart becomes on a dark page.
NIGHT: dict[str, str] = {
    PAPER: DARK_PAPER, INK: "#e4e7ec", SOFT: "#9aa4b2", TICK: "#b6bec9", RULE: "#8f98a6",
    FAINT: "#4a525e", GRID: "#2a3038",
    **dict(zip(VERDICTS.values(), ("#1f5a33", "#23402d", "#333a44", "#4d3a1a", DARK_PAPER),
               strict=True)),
    **dict(shade for shades in HUES.values() for shade in shades),
}  # fmt: skip


class Look(NamedTuple):
    """How an architecture is drawn: colour by day (#rrggbb) and the name of its shape."""

    colour: str
    shape: str


def looks_of(family: Family) -> list[Look]:
    """All looks of a family, neighbours different in shade and in shape."""
    shades, forms = HUES[family], FORMS[family]
    # The numbers of shades and of shapes have no common divisor, so every pair comes up once.
    return [
        Look(shades[i % len(shades)][0], forms[i % len(forms)])
        for i in range(len(shades) * len(forms))
    ]


@cache
def known_looks() -> dict[str, Look]:
    """The looks of the architectures that are known by name: the first ones of their families."""
    free = {family: iter(looks_of(family)) for family in HUES}
    return {arch: next(free[family]) for arch, family in KNOWN.items()}


@dataclass(frozen=True, slots=True)
class Palette:
    """The looks of a table's architectures, family by family: the same on every page."""

    looks: dict[str, Look]

    @classmethod
    def of(cls, archs: Iterable[str], families: Mapping[str, Family] | None = None) -> "Palette":
        """Known names have looks of their own; any other name picks one of those left over.

        Where two other names pick the same one, the second in alphabetical order takes the next,
        as long as there is one. families: of names that are not known.
        """

        def hue(name: str) -> Family:
            return known_family(name) or (families or {}).get(name, "unknown")

        names = sorted(dict.fromkeys(archs), key=lambda name: list(HUES).index(hue(name)))
        known = known_looks()
        found = {name: known[name] for name in names if name in known}
        taken: set[Look] = set()
        for name in sorted(set(names) - set(known)):
            pool = [look for look in looks_of(hue(name)) if look not in known.values()]
            first = crc32(name.encode()) % len(pool)
            order = pool[first:] + pool[:first]
            found[name] = next((look for look in order if look not in taken), order[0])
            taken.add(found[name])
        return cls({name: found[name] for name in names})

    @property
    def archs(self) -> list[str]:
        """The names, family by family and in the table's order."""
        return list(self.looks)

    def colour(self, *, legend: bool = False) -> alt.Color:
        """The colour channel; with a legend of one column."""
        return alt.Color("arch:N", scale=self._colours, legend=_legend(legend))

    def fill(self) -> alt.Fill:
        """The colour as fill, for points whose filling tells them apart."""
        return alt.Fill("arch:N", scale=self._colours, legend=None)

    def shape(self, *, legend: bool = False) -> alt.Shape:
        """The point shape channel; its legend merges with that of the colour."""
        paths = [SHAPES[look.shape] for look in self.looks.values()]
        scale = alt.Scale(domain=self.archs, range=paths)
        return alt.Shape("arch:N", scale=scale, legend=_legend(legend))

    @property
    def _colours(self) -> alt.Scale:
        return alt.Scale(domain=self.archs, range=[look.colour for look in self.looks.values()])


def _legend(shown: bool) -> alt.Legend | None:
    return alt.Legend(title=None, symbolSize=90, labelLimit=220) if shown else None
