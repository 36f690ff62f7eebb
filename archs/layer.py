"""A model's layers as data: what each consists of, whoever chose it.

A pattern and a scale make a tuple of these, all of one MLP width; a published model names its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from archs.checks import at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """One layer.

    mixer: a registry name, or the path of a file that defines one.
    options: the mixer's, over what the scale gives.
    hidden: MLP width; 0: no MLP.
    short_conv: width of a short convolution before the mixer; 0: none.
    """

    mixer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    hidden: int = 0
    short_conv: int = 0

    def __post_init__(self) -> None:
        at_least(self, 0, "hidden", "short_conv")
