"""A ladder of sizes: loss fitted against parameters, and how many parameters equal loss takes.

L = E + A_m / N^a over all architectures m of a ladder, E and a shared, N the parameters with the
head (arXiv 2001.08361 and 2203.15556 for the form; sharing E and a, so that architectures differ by
one number). Least squares of relative errors: with the exponent given, E and every A are linear
and solved exactly (variable projection), so one number is searched for, over its whole range.

Intervals of size ratios are Student's, from what the fit leaves unexplained; they are given where
every size has several seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from archs.errors import UserError
from eval.results.statistics import LEVEL, Array, student_t_quantile

LEAST_SIZES = 3
#: A ladder tells sizes apart where its loss falls by this many times the fit's residual.
TOLD_APART = 2.0
#: Columns in which all points of a fit agree.
ALIKE = ("corpus", "tokens", "config_hash")
#: Exponents that are searched; published ones lie between 0.05 and 0.7.
EXPONENTS = np.geomspace(1e-3, 10, 200)
#: The floor stays below the smallest loss by this share of it.
BELOW = 1e-3


@dataclass(frozen=True, slots=True)
class Fit:
    """L = floor + scale[arch] / N^exponent. error: root mean square of relative residuals."""

    floor: float
    exponent: float
    scale: Mapping[str, float]
    error: float

    def loss(self, arch: str, parameters: float) -> float:
        """The fitted loss at a size."""
        return self.floor + self.scale[arch] / parameters**self.exponent

    def size_ratio(self, arch: str, reference: str) -> float:
        """Parameters of `arch` over those of `reference` at equal loss, whatever the loss."""
        return float((self.scale[arch] / self.scale[reference]) ** (1 / self.exponent))


def trained_sizes(results: pd.DataFrame) -> pd.DataFrame:
    """Bits per byte of the trained models: columns arch, scale, seed, parameters, loss, `ALIKE`."""
    rows = results[(results["measure"] == "bits_per_byte") & (results["stage"] == "train")]
    return pd.DataFrame(
        {
            "arch": rows["arch"], "scale": rows["scale"], "seed": rows["seed"],
            "parameters": rows["params"].astype(float), "loss": rows["value"].astype(float),
            **{name: rows[name] for name in ALIKE if name in rows},
        }
    ).dropna(subset=["parameters", "loss"])  # fmt: skip


def long_enough(points: pd.DataFrame) -> list[str]:
    """The architectures with enough sizes to fit."""
    sizes = points.groupby("arch")["parameters"].nunique()
    return [str(arch) for arch, count in sizes.items() if count >= LEAST_SIZES]


def ladder_points(results: pd.DataFrame) -> pd.DataFrame:
    """`trained_sizes` of a ladder. Raises UserError where an architecture has too few sizes, and
    where the points were not trained alike.
    """
    points = trained_sizes(results)
    short = sorted({str(a) for a in points["arch"]} - set(long_enough(points)))
    if points.empty or short:
        who = ", ".join(short) or "no architecture"
        raise UserError(
            f"these results hold fewer than {LEAST_SIZES} trained sizes of {who}; run the suite "
            "`ladder` (or one with train.ladder) first"
        )
    if unlike := mixed(points):
        found = " and ".join(map(str, points[unlike].unique()))
        raise UserError(
            f"these results mix trainings of {unlike} {found}, which are no seeds of each other; "
            "name the runs of one suite"
        )
    return points


def mixed(points: pd.DataFrame) -> str | None:
    """The first of `ALIKE` in which the points differ."""
    return next((n for n in ALIKE if n in points and points[n].nunique() > 1), None)


@dataclass(frozen=True, slots=True)
class _Ladder:
    """Points as arrays: architecture [P], size over the sizes' geometric mean [P], loss [P]."""

    archs: tuple[str, ...]
    which: NDArray[np.int64]
    size: Array
    loss: Array
    middle: float

    @classmethod
    def of(cls, points: pd.DataFrame) -> "_Ladder":
        archs = tuple(sorted(map(str, points["arch"].unique())))
        sizes = points["parameters"].to_numpy(dtype=float)
        middle = exp(float(np.log(sizes).mean()))
        which = np.array([archs.index(a) for a in points["arch"]])
        return cls(archs, which, sizes / middle, points["loss"].to_numpy(dtype=float), middle)

    def solve(self, exponent: float) -> tuple[float, float, Array]:
        """At an exponent: the sum of squared relative errors, the floor, the scales [M]."""
        fall, inverse = self.size**-exponent / self.loss, 1 / self.loss
        squares = self._sum(fall * fall)
        one, floor = (
            x - fall * (self._sum(fall * x) / squares)[self.which]
            for x in (np.ones_like(fall), inverse)
        )
        best = float(one @ floor) / max(float(floor @ floor), 1e-300)
        best = min(max(best, 0.0), (1 - BELOW) * float(self.loss.min()))
        rest = one - best * floor
        return float(rest @ rest), best, self._sum(fall * (1 - best * inverse)) / squares

    def _sum(self, values: Array) -> Array:
        """By architecture."""
        return np.bincount(self.which, values, len(self.archs)).astype(np.float64)

    def exponent(self) -> float:
        """The exponent of the least sum of squares: every valley of the grid, then its bottom."""
        heights = [self.solve(float(a))[0] for a in EXPONENTS]
        inner = range(1, len(EXPONENTS) - 1)
        valleys = [i for i in inner if heights[i] <= min(heights[i - 1], heights[i + 1])]
        valleys = valleys or [min(inner, key=lambda i: heights[i])]
        bottoms = [self._bottom(*map(float, np.log(EXPONENTS[[i - 1, i + 1]]))) for i in valleys]
        return min(bottoms, key=lambda a: self.solve(a)[0])

    def _bottom(self, low: float, high: float) -> float:
        """Golden section between two logarithms of exponents."""
        golden = (sqrt(5) - 1) / 2
        a, b = high - golden * (high - low), low + golden * (high - low)
        at_a, at_b = self.solve(exp(a))[0], self.solve(exp(b))[0]
        for _ in range(80):
            if at_a < at_b:
                high, b, at_b = b, a, at_a
                a = high - golden * (high - low)
                at_a = self.solve(exp(a))[0]
            else:
                low, a, at_a = a, b, at_b
                b = low + golden * (high - low)
                at_b = self.solve(exp(b))[0]
        return exp((low + high) / 2)


def fit_ladder(points: pd.DataFrame) -> Fit:
    """Fit floor, exponent and each architecture's scale to the ladder's points."""
    ladder = _Ladder.of(points)
    exponent = ladder.exponent()
    squares, floor, scales = ladder.solve(exponent)
    whole = scales * ladder.middle**exponent
    fitted = dict(zip(ladder.archs, whole.tolist(), strict=True))
    return Fit(floor, exponent, fitted, sqrt(squares / len(points)))


def require_fall(points: pd.DataFrame, fit: Fit) -> None:
    """Raise UserError where the loss does not fall with size: a ratio of sizes would be noise."""
    ends = (float(points["parameters"].min()), float(points["parameters"].max()))
    fall = max(log(fit.loss(arch, ends[0]) / fit.loss(arch, ends[1])) for arch in fit.scale)
    if fall < TOLD_APART * fit.error:
        raise UserError(
            f"the ladder's loss falls by {fall:.1%} from {ends[0]:,.0f} to {ends[1]:,.0f} "
            f"parameters and the fit misses it by {fit.error:.1%}: sizes are not told apart, so no "
            "size follows from a loss; train longer, with more seeds, or on a wider ladder"
        )


def size_ratios(points: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Parameters needed for the reference's loss, as a ratio, with a 95 % interval.

    Columns arch, ratio, low, high; the interval is missing unless every size has several seeds.
    Raises UserError on a reference that is not in the points, and where sizes are not told apart.
    """
    archs = sorted(points["arch"].unique())
    if reference not in archs:
        raise UserError(f"reference '{reference}' is not in the ladder; it has {', '.join(archs)}")
    fit = fit_ladder(points)
    require_fall(points, fit)
    table = pd.DataFrame({"arch": archs, "ratio": [fit.size_ratio(a, reference) for a in archs]})
    if points.groupby(["arch", "parameters"]).size().min() > 1:
        spread = np.exp(_half_widths(points, fit, archs.index(reference)))
        table = table.assign(low=table["ratio"] / spread, high=table["ratio"] * spread)
    return table


def _half_widths(points: pd.DataFrame, fit: Fit, reference: int) -> Array:
    """Half widths of the 95 % intervals of the ratios' logarithms, by the delta method [M]."""
    ladder = _Ladder.of(points)
    squares, _floor, scales = ladder.solve(fit.exponent)
    count = len(ladder.archs)
    fall = ladder.size**-fit.exponent / ladder.loss
    own = scales[ladder.which] * fall
    slopes = np.zeros((len(points), 2 + count))
    slopes[:, 0] = -np.log(ladder.size) * own
    slopes[:, 1] = 1 / ladder.loss
    # By the scales' logarithms.
    slopes[np.arange(len(points)), 2 + ladder.which] = own
    freedom = len(points) - slopes.shape[1]
    covariance = np.linalg.pinv(slopes.T @ slopes) * squares / freedom
    gain = np.zeros((count, 2 + count))
    gain[:, 0] = -(np.log(scales) - np.log(scales[reference])) / fit.exponent**2
    gain[np.arange(count), 2 + np.arange(count)] += 1 / fit.exponent
    gain[:, 2 + reference] -= 1 / fit.exponent
    variance = np.einsum("mi,ij,mj->m", gain, covariance, gain)
    return np.asarray(student_t_quantile((1 + LEVEL) / 2, freedom) * np.sqrt(variance))
