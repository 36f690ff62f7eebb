"""How much layers, units and channels of a model do on calibration text, for `train.prune`.

Activations alone tell, with no gradients: block influence for layers (ShortGPT, arXiv 2403.03853)
and norms of activations for all else (Minitron, arXiv 2407.14679).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from archs.axes import Axis, Signal
from archs.backbone import Model
from archs.errors import MisfitError
from train.observe import Observed


def least_influential(influence: Tensor, tied: Sequence[Sequence[int]], count: int) -> list[int]:
    """The `count` layers of least influence in all (ShortGPT), with those that share rows together.

    influence: [L]; tied: `archs.narrow.teams`. Raises MisfitError where no such layers add up to
    `count` of fewer than L.
    """
    layers = len(influence)
    # The best choice of teams for each number of layers that some make together.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for team in tied:
        own = float(influence[list(team)].sum())
        for size, (total, members) in sorted(best.items(), reverse=True):
            wider = size + len(team)
            if wider < layers and (wider not in best or total + own < best[wider][0]):
                best[wider] = total + own, [*members, *team]
    if count not in best:
        possible = ", ".join(str(size) for size in sorted(best) if size) or "none"
        raise MisfitError(
            f"{count} of {layers} layers cannot be removed: some must stay, and those that share "
            f"rows go together; numbers that can be: {possible}"
        )
    return sorted(best[count][1])


def unit_importance(model: Model, layer: int, axis: Axis, seen: Observed) -> Tensor:
    """How much each unit does, float64 [count]: for what it makes, the root mean square of its
    activations (Minitron's aggregation by L2 norm); for what goes through a matrix, each channel's
    times the norm of the column that reads it, in squares over the unit's channels; where an axis
    names several signals, as q and k of a channel, their product.
    """
    prefix = f"blocks.{layer}."
    found = [_strength(model, prefix, signal, seen) for signal in axis.signals]
    return torch.stack(found).prod(0)


def _strength(model: Model, prefix: str, signal: Signal, seen: Observed) -> Tensor:
    name = prefix + signal.projection
    read, made = seen.projections[name]
    power = made.mean_square
    if signal.side == "in":
        weight = model.get_parameter(f"{name}.weight").double()
        power = read.mean_square * weight.square().sum(0)
    return power[signal.units.to(power.device)].sum(1).sqrt()


def channel_importance(seen: Observed) -> Tensor:
    """Of each channel of the residual stream: mean absolute normed activation, summed over the
    backbone's norms (Minitron, arXiv 2407.14679). float64 [D].
    """
    return torch.stack([sums.magnitudes / sums.rows for sums in seen.normed.values()]).sum(0)
