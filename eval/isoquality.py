"""At equal loss, what does a million tokens cost: loss fitted against size, size into decode cost.

L = E + A_m / N^a over all architectures m of a ladder, E and a shared, N the parameters with the
head (arXiv 2001.08361 and 2203.15556 for the form; sharing E and a, so that architectures differ by
one number). Fitted by Huber loss on log L, summed, from a grid of starts. Intervals resample seeds
within each architecture and size and fit again.

A fit of small models says how many times the reference's parameters an architecture needs for the
reference's loss. A deployment shape is then made deeper or shallower by that ratio: its layers'
bytes and FLOPs grow by it, embedding and head do not. How far that reaches beyond the ladder is in
every row (`extrapolation`): 2 is bold, 1000 is an assumption.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from archs.cost import Cost, Step
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.accelerators import hardware_of
from eval.predict import require_grid, require_prices, step_ms

Array = NDArray[np.float64]
#: Where Huber's loss on log L turns from a square to a line.
DELTA = 1e-3
LEAST_SIZES = 3
REFITS = 200
#: A ladder tells sizes apart where its loss falls by this many times the fit's residual.
TOLD_APART = 2.0


@dataclass(frozen=True, slots=True)
class Fit:
    """L = floor + scale[arch] / N^exponent. error: root mean square of log L's residuals."""

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
    """Columns arch, scale, seed, parameters, loss (bits per byte) of the trained models."""
    rows = results[(results["measure"] == "bits_per_byte") & (results["stage"] == "train")]
    return pd.DataFrame(
        {
            "arch": rows["arch"], "scale": rows["scale"], "seed": rows["seed"],
            "parameters": rows["params"].astype(float), "loss": rows["value"].astype(float),
        }
    ).dropna()  # fmt: skip


def long_enough(points: pd.DataFrame) -> list[str]:
    """The architectures with enough sizes to fit."""
    sizes = points.groupby("arch")["parameters"].nunique()
    return [str(arch) for arch, count in sizes.items() if count >= LEAST_SIZES]


def ladder_points(results: pd.DataFrame) -> pd.DataFrame:
    """`trained_sizes` of a ladder. Raises UserError where an architecture has too few sizes."""
    points = trained_sizes(results)
    short = sorted({str(a) for a in points["arch"]} - set(long_enough(points)))
    if points.empty or short:
        who = ", ".join(short) or "no architecture"
        raise UserError(
            f"these results hold fewer than {LEAST_SIZES} trained sizes of {who}; run the suite "
            "`ladder` (or one with train.ladder) first"
        )
    return points


def fit_ladder(points: pd.DataFrame) -> Fit:
    """Fit floor, exponent and each architecture's scale to the ladder's points."""
    archs = sorted(points["arch"].unique())
    which = torch.tensor([archs.index(a) for a in points["arch"]])
    log_n = torch.tensor(np.log(points["parameters"].to_numpy()))
    log_l = torch.tensor(np.log(points["loss"].to_numpy()))
    least = float(points["loss"].min())
    starts = [
        _start(log_n, log_l, which, len(archs), share * least, exponent)
        for share in (0.0, 0.3, 0.6, 0.9)
        for exponent in (0.1, 0.3, 0.8)
    ]
    found = min(
        (_descend(start, log_n, log_l, which, least) for start in starts), key=lambda pair: pair[0]
    )[1]
    floor, exponent, scales, predicted = _unpack(found, log_n, which, least)
    error = float((predicted - log_l).square().mean().sqrt())
    return Fit(float(floor), float(exponent), dict(zip(archs, scales.tolist(), strict=True)), error)


def _start(
    log_n: torch.Tensor, log_l: torch.Tensor, which: torch.Tensor, count: int, floor: float,
    exponent: float,
) -> torch.Tensor:  # fmt: skip
    """Parameters at one grid point: each scale in closed form from its own points."""
    above = (log_l.exp() - floor).log() + exponent * log_n
    scales = torch.stack([above[which == m].mean() for m in range(count)])
    share = min(max(floor / float(log_l.exp().min()), 1e-3), 1 - 1e-3)
    head = torch.tensor([math.log(share / (1 - share)), math.log(exponent)], dtype=torch.float64)
    return torch.cat((head, scales))


def _unpack(
    parameters: torch.Tensor, log_n: torch.Tensor, which: torch.Tensor, least: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    floor, exponent = parameters[0].sigmoid() * least, parameters[1].exp()
    above = parameters[2:][which] - exponent * log_n
    return floor, exponent, parameters[2:].exp(), (floor + above.exp()).log()


def _descend(
    start: torch.Tensor, log_n: torch.Tensor, log_l: torch.Tensor, which: torch.Tensor,
    least: float,
) -> tuple[float, torch.Tensor]:  # fmt: skip
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        predicted = _unpack(parameters, log_n, which, least)[3]
        # A sum: the mean of errors this small would end the search at once (arXiv 2404.10102).
        loss = torch.nn.functional.huber_loss(predicted, log_l, reduction="sum", delta=DELTA)
        loss.backward()
        return loss

    optimizer.step(closure)
    final = float(closure().detach())
    return (final, parameters.detach()) if math.isfinite(final) else (math.inf, start)


def require_fall(points: pd.DataFrame, fit: Fit) -> None:
    """Raise UserError where the loss does not fall with size: a ratio of sizes would be noise."""
    ends = (float(points["parameters"].min()), float(points["parameters"].max()))
    fall = max(math.log(fit.loss(arch, ends[0]) / fit.loss(arch, ends[1])) for arch in fit.scale)
    if fall < TOLD_APART * fit.error:
        raise UserError(
            f"the ladder's loss falls by {fall:.1%} from {ends[0]:,.0f} to {ends[1]:,.0f} "
            f"parameters and the fit misses it by {fit.error:.1%}: sizes are not told apart, so no "
            "size follows from a loss; train longer, with more seeds, or on a wider ladder"
        )


def size_ratios(points: pd.DataFrame, reference: str, *, seed: int = 0) -> pd.DataFrame:
    """Parameters needed for the reference's loss, as a ratio, with a 95 % bootstrap interval.

    Columns arch, ratio, low, high; the interval is missing where every size has a single seed.
    Raises UserError on a reference that is not in the points, and where sizes are not told apart.
    """
    archs = sorted(points["arch"].unique())
    if reference not in archs:
        raise UserError(f"reference '{reference}' is not in the ladder; it has {', '.join(archs)}")
    whole = fit_ladder(points)
    require_fall(points, whole)
    seeds = points.groupby(["arch", "parameters"]).size()
    draws: list[list[float]] = []
    if seeds.min() > 1:
        generator = np.random.default_rng(seed)
        for _ in range(REFITS):
            again = _warm(_resampled(points, generator), whole)
            draws.append([again.size_ratio(arch, reference) for arch in archs])
    rows = []
    for i, arch in enumerate(archs):
        row: dict[str, object] = {"arch": arch, "ratio": whole.size_ratio(arch, reference)}
        if draws:
            low, high = np.percentile([draw[i] for draw in draws], [2.5, 97.5])
            row |= {"low": float(low), "high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def _resampled(points: pd.DataFrame, generator: np.random.Generator) -> pd.DataFrame:
    groups = [
        group.iloc[generator.integers(0, len(group), len(group))]
        for _, group in points.groupby(["arch", "parameters"])
    ]
    return pd.concat(groups)


def _warm(points: pd.DataFrame, near: Fit) -> Fit:
    """A refit that starts from a fit of nearly the same points."""
    archs = sorted(near.scale)
    which = torch.tensor([archs.index(a) for a in points["arch"]])
    log_n = torch.tensor(np.log(points["parameters"].to_numpy()))
    log_l = torch.tensor(np.log(points["loss"].to_numpy()))
    least = float(points["loss"].min())
    floor = min(near.floor, 0.999 * least)
    start = _start(log_n, log_l, which, len(archs), floor, near.exponent)
    _, found = _descend(start, log_n, log_l, which, least)
    floor_t, exponent, scales, predicted = _unpack(found, log_n, which, least)
    error = float((predicted - log_l).square().mean().sqrt())
    fitted = dict(zip(archs, scales.tolist(), strict=True))
    return Fit(float(floor_t), float(exponent), fitted, error)


def iso_quality_cost(
    results: pd.DataFrame,
    reference: str,
    *,
    scale: str = "1b",
    hardware: Sequence[str] = ("h100",),
    batches: Sequence[int] = (64,),
    contexts: Sequence[int] = (16384,),
    price_per_hour: Mapping[str, float] | None = None,
    dtype: str = "bfloat16",
) -> list[dict[str, object]]:
    """Cost of decoding at the loss that `reference` has at `scale`, an architecture a row.

    Rows carry `size_ratio` with its interval, `tpot_ms` at the scaled depth, the cost of a million
    tokens where a price is given, and `extrapolation`: the shape's parameters over the ladder's
    largest. Raises UserError on unknown names and on ladders that are too short.
    """
    require_grid(hardware=hardware, batches=batches, contexts=contexts)
    require_prices(price_per_hour or {}, hardware)
    points = ladder_points(results)
    ratios = size_ratios(points, reference)
    shape, prices = get_scale(scale), price_per_hour or {}
    rows: list[dict[str, object]] = []
    for part in (hardware_of(key, dtype) for key in hardware):
        for found in ratios.to_dict("records"):
            arch, ratio = str(found["arch"]), float(found["ratio"])
            model = ModelSpec(arch=arch, scale=shape).outline(part.roofline.dtype)
            size = sum(p.numel() for p in model.parameters())
            for step in (Step(b, 1, c) for b in batches for c in contexts):
                layers = Cost.total([block.cost(step) for block in model.layers])
                ends_ms = step_ms(model.cost(step), part.roofline) - step_ms(layers, part.roofline)
                tpot_ms = ends_ms + ratio * step_ms(layers, part.roofline)
                row: dict[str, object] = {
                    "arch": arch, "reference": reference, "scale": scale, "hardware": part.key,
                    "batch": step.batch, "context": step.context, "size_ratio": ratio,
                    "size_ratio_low": found.get("low"), "size_ratio_high": found.get("high"),
                    "tpot_ms": tpot_ms, "output_tok_per_s": 1e3 * step.batch / tpot_ms,
                    "state_bytes": ratio * model.state_bytes(step.context),
                    "extrapolation": size / float(points["parameters"].max()),
                }  # fmt: skip
                if part.key in prices:
                    per_token_s = tpot_ms / 1e3 / step.batch
                    row["usd_per_million_tok"] = prices[part.key] / 3600 * per_token_s * 1e6
                rows.append(row)
    return rows
