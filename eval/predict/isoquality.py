"""The cost of a million tokens at equal loss: a ladder's ratios applied to a deployment shape.

`eval.results.ladder` says how many times the reference's parameters an architecture needs for the
reference's loss. A deployment shape is then made deeper or shallower by that ratio: its layers'
bytes and FLOPs grow by it, embedding and head do not. How far that reaches beyond the ladder is in
every row (`extrapolation`), and past `REACH` times in words.
"""

from collections.abc import Mapping, Sequence

import pandas as pd

from archs.cost import Cost, Step
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.predict.accelerators import hardware_of
from eval.predict.roofline import (
    calls_on,
    require_grid,
    require_prices,
    resident_bytes,
    room,
    served,
    step_ms,
)
from eval.results.ladder import ladder_points, size_ratios

#: Times the ladder's largest model up to which a fit of it is evidence.
REACH = 2.0


def iso_quality_cost(
    results: pd.DataFrame, reference: str = "gqa", *, scale: str = "1b",
    hardware: Sequence[str] = ("h100",), batches: Sequence[int] = (64,),
    contexts: Sequence[int] = (16384,), price_per_hour: Mapping[str, float] | None = None,
    dtype: str = "bfloat16",
) -> list[dict[str, object]]:  # fmt: skip
    """Cost of decoding at the loss that `reference` has at `scale`, an architecture a row.

    Rows carry `size_ratio` with its interval, whether the batch `fits` in memory at the scaled
    depth and how many sequences would (`max_sequences`), where it fits `tpot_ms` at that depth and,
    where a price is given, the cost of a million tokens, `extrapolation`: the shape's parameters
    over the ladder's largest, a `note` on a batch that does not fit, and a `caution` where the
    extrapolation is far. Raises UserError on unknown names and on ladders that are too short or
    were not trained alike.
    """
    require_grid(hardware=hardware, batches=batches, contexts=contexts)
    require_prices(price_per_hour or {}, hardware)
    points = ladder_points(results)
    ratios = size_ratios(points, reference)
    shape, prices = get_scale(scale), price_per_hour or {}
    rows: list[dict[str, object]] = []
    for part in (hardware_of(key, dtype, batches) for key in hardware):
        for found in ratios.to_dict("records"):
            arch, ratio = str(found["arch"]), float(found["ratio"])
            spec = ModelSpec(arch=arch, scale=shape)
            model, calls = spec.outline(part.roofline.dtype), calls_on(part, spec, None)
            size = sum(p.numel() for p in model.parameters())
            deep = sum(p.nbytes for block in model.layers for p in block.parameters())
            weight_bytes = resident_bytes(model) + (ratio - 1) * deep
            reach = size / float(points["parameters"].max())
            for step in (Step(b, 1, c) for b in batches for c in contexts):
                layers = Cost.total([block.cost(step) for block in model.layers])
                ends_ms = step_ms(model.cost(step), part.roofline) - step_ms(layers, part.roofline)
                # Launches beside those of operations are nearly all the layers'.
                made = calls.at(step.context) if calls else None
                tpot_ms = ends_ms + ratio * step_ms(layers, part.roofline, calls=made)
                state_bytes = ratio * model.state_bytes(step.context)
                sequences = room(part, weight_bytes, state_bytes)
                row: dict[str, object] = {
                    "arch": arch, "reference": reference, "scale": scale, "hardware": part.key,
                    "batch": step.batch, "context": step.context, "size_ratio": ratio,
                    "size_ratio_low": found.get("low"), "size_ratio_high": found.get("high"),
                    "state_bytes": state_bytes, "extrapolation": reach,
                }  # fmt: skip
                row |= served(step.batch, tpot_ms, sequences, prices.get(part.key))
                rows.append(row | {"caution": far(reach, scale) if reach > REACH else ""})
    return rows


def far(reach: float, scale: str) -> str:
    """A caution if a shape has `reach` times the parameters of the ladder's largest model."""
    about = float(f"{reach:.2g}")
    return (
        f"{scale} has about {about:,.0f} times the parameters of the ladder's largest model; a fit "
        f"is evidence up to about {REACH:g} times, so ratios and what follows from them are a "
        "direction, no estimate"
    )
