"""The family of a model by what its layers remember, never by its name."""

from collections.abc import Iterable

from archs.spec import StateSpec
from eval.results.families import Family


def state_family(specs: Iterable[StateSpec]) -> Family:
    """The family of a model from the state specs of its layers.

    A row without a head axis is one that all heads share: latent. Layers that read another
    layer's rows count with their owner.
    """
    kinds: set[Family] = set()
    for spec in specs:
        if spec.rows and not spec.owned:
            continue
        growing = [t for t in spec.owned if t.window is None]
        if growing:
            kinds.add("latent" if all(len(t.shape) == 1 for t in growing) else "softmax")
        else:
            kinds.add("window" if spec.owned else "recurrent")
    if len(kinds) > 1:
        return "hybrid"
    return kinds.pop() if kinds else "unknown"
