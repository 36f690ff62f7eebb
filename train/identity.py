"""What a training run is: its model, its recipe and its data, and the hash of all that tells two
runs apart.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from archs.checks import parse
from archs.layers import NORM_EPS
from archs.registry import ModelSpec
from train.recipe import UNHASHED, Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """What a run is: model, recipe and data. Two runs with one identity give one result.

    data: fingerprint of tokenizer and corpus, or of a synthetic task.
    source: what the spec's architecture files said (`archs.registry.source_digest`).
    """

    spec: ModelSpec
    recipe: Recipe
    data: str = ""
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with the MLP width in use instead of the rule for it.

        Fields that came later are left out at their defaults, so that hashes of before hold.
        """
        given = self.spec
        spec: dict[str, Any] = {
            "arch": given.arch,
            "scale": asdict(given.scale),
            "overrides": {name: dict(options) for name, options in given.overrides.items()},
            "hidden": None if given.layers else given.mlp_hidden(),
            "short_conv": given.short_conv,
        }
        spec |= {"layers": [asdict(layer) for layer in given.layers]} if given.layers else {}
        spec |= {} if given.tied else {"tied": False}
        spec |= {} if given.norm_eps == NORM_EPS else {"norm_eps": given.norm_eps}
        values = {"spec": spec, "recipe": self.recipe.to_dict(), "data": self.data}
        return values | ({"source": self.source} if self.source else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` returned. Raises UserError on values of other types."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name != "source"}
        return parse(cls, known | {"source": values.get("source", "")}, "identity")

    def hashed(self) -> dict[str, Any]:
        """The values that determine the weights, flat: `recipe.seed`, `spec.arch`, ..."""
        values = flat("", self.to_dict())
        return {k: v for k, v in values.items() if k.removeprefix("recipe.") not in UNHASHED}

    @property
    def config_hash(self) -> str:
        """12 hex digits over all values that determine the weights."""
        text = json.dumps(self.hashed(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, names joined by dots; lists for tuples, as JSON has them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(f"{name}.", value)
        else:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found
