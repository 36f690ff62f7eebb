"""Colours as eyes see them: contrast, distance, and sight without green cones."""

from collections.abc import Sequence
from math import dist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: Linear sRGB to CIE XYZ (D65), IEC 61966-2-1.
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip
#: Deuteranopia (severity 1.0) in linear RGB: Machado, Oliveira and Fernandes, IEEE TVCG 2009.
DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
     [-0.011820, 0.042940, 0.968881]]
)  # fmt: skip
NORMAL = np.eye(3)


def linear(colour: str) -> Array:
    """Linear RGB of #rrggbb."""
    coded = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio, from 1 to 21."""
    dark, light = sorted(float(XYZ[1] @ linear(colour)) for colour in (first, second))
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: Array) -> Sequence[float]:
    """CIE L*a*b* (D65) of linear RGB."""
    ratio = XYZ @ rgb / (XYZ @ np.ones(3))
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def delta_e(first: str, second: str, sight: Array = NORMAL) -> float:
    """CIE76 distance of two colours as `sight` shows them."""
    return dist(*(lab(np.clip(sight @ linear(colour), 0, 1)) for colour in (first, second)))
