"""The dimensions of a layer that can be made narrower, as data.

A mixer says which rows and columns of its parameters belong to each unit of a dimension (a head, a
channel, a state) and which options follow, so that one mechanism prunes every architecture
(`archs.narrow`). Parameters are named as in the mixer's own `named_parameters`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["state", "width"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slice:
    """Which indices along `dim` of a parameter belong to each unit: int64 [count, k]."""

    parameter: str
    dim: int
    units: Tensor

    def __post_init__(self) -> None:
        if self.units.dim() != 2:
            raise ValueError(f"units of {self.parameter} are {list(self.units.shape)}, not [n, k]")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Signal:
    """What tells how much a unit does: the inputs or outputs of a projection that are its own.

    side: "in" for the columns that read it, each weighed by its norm; "out" for rows that make it.
    units: int64 [count, k].
    """

    projection: str
    side: Literal["in", "out"]
    units: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Axis:
    """One dimension, of `count` units.

    kind: "state" where fewer units make what is remembered smaller, "width" where they only make
      weights fewer.
    groups: units lie in so many equal groups (heads, say), one after the other; each keeps the
      same number.
    fields: options and what each unit that a group keeps adds to them.
    inverse: options that grow as the number of units shrinks: what norms and scales add to a mean
      over the units.
    listed: options with one value for each unit, as they are.
    norm: the weight of a norm whose statistic runs over the units, and `reader` the projection
      that reads it: its size is fitted anew.
    folded: a weight that all groups share, and the matrix [N, K] that reads it, over whose columns
      it repeats: it goes into the matrix first, so that groups may keep different units.
    """

    name: str
    kind: Kind
    slices: tuple[Slice, ...]
    signals: tuple[Signal, ...]
    fields: Mapping[str, int]
    groups: int = 1
    inverse: tuple[str, ...] = ()
    listed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    norm: str = ""
    reader: str = ""
    folded: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        counts = {len(s.units) for s in self.slices} | {len(s.units) for s in self.signals}
        counts |= {len(values) for values in self.listed.values()}
        if len(counts) != 1 or self.count % self.groups:
            raise ValueError(
                f"axis {self.name} has units {sorted(counts)} in {self.groups} groups; all must be "
                "one number that the groups divide"
            )
        if bool(self.norm) != bool(self.reader):
            raise ValueError(f"axis {self.name} names a norm or its reader alone; name both")

    @property
    def count(self) -> int:
        """Units in all groups."""
        return len(self.slices[0].units)

    @property
    def per_group(self) -> int:
        """Units of one group."""
        return self.count // self.groups

    def within(self, prefix: str) -> "Axis":
        """The same axis as seen from a module that holds this one by the name `prefix`."""

        def longer(name: str) -> str:
            return f"{prefix}.{name}" if name else ""

        return replace(
            self,
            slices=tuple(replace(s, parameter=longer(s.parameter)) for s in self.slices),
            signals=tuple(replace(s, projection=longer(s.projection)) for s in self.signals),
            norm=longer(self.norm),
            reader=longer(self.reader),
            folded=self.folded and (longer(self.folded[0]), longer(self.folded[1])),
        )

    def options_after(self, options: Mapping[str, Any], units: Tensor) -> dict[str, Any]:
        """A layer's options once only `units` [n] of all groups are left."""
        left, after = len(units) // self.groups, dict(options)
        after |= {name: each * left for name, each in self.fields.items()}
        for name in self.inverse:
            after[name] = float(after[name]) * (self.per_group / left)
        for name, values in self.listed.items():
            after[name] = [values[unit] for unit in units.tolist()]
        return after


def spans(start: int, count: int, width: int) -> Tensor:
    """`count` units of `width` neighbouring indices from `start` on: int64 [count, width]."""
    return start + torch.arange(count * width).view(count, width)


def rows(parameter: str, *units: Tensor) -> Slice:
    """The indices of dimension 0 that units [count, k] each name."""
    return Slice(parameter=parameter, dim=0, units=torch.cat(units, 1))


def columns(parameter: str, units: Tensor) -> Slice:
    """The indices of dimension 1 that units [count, k] name."""
    return Slice(parameter=parameter, dim=1, units=units)


def read_by(projection: str, units: Tensor) -> Signal:
    """Units that a projection reads by these of its columns."""
    return Signal(projection=projection, side="in", units=units)


def made_by(projection: str, units: Tensor) -> Signal:
    """Units that a projection makes by these of its rows."""
    return Signal(projection=projection, side="out", units=units)
