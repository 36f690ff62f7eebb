"""The contract of a token mixer: one file, four members.

`forward` is the parallel form for training; `extend` adds K new tokens to what the state holds
(prefill, decode and verification of drafts are one verb); `state_spec` declares what must be
remembered; `cost` predicts FLOPs and bytes. The law: any split of a sequence into `extend`
calls gives the same outputs and the same state as one `forward`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from archs.axes import Axis
from archs.checks import convert
from archs.cost import Cost, Step
from archs.errors import UserError, unknown_name
from archs.spec import StateSpec
from archs.state import LayerState
from archs.state_formats import StateFormat

if TYPE_CHECKING:
    from archs.sizes import Scale

Initialiser = Callable[[Tensor, torch.Generator], object]
Shared = dict[int, Any]
#: Where in `Shared` a caller that trains leaves a list for the losses of mixers' own.
LOSSES = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where in the model a mixer stands.

    layer: this layer's index; siblings: the indices of all layers with the same mixer.
    """

    d_model: int
    n_layers: int
    layer: int
    siblings: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerConfig:
    """Base of each mixer's own frozen configuration; `at` fits it to a scale."""

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """The values that depend on the scale (heads, ranks, widths)."""
        return {}

    @classmethod
    def following(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Values that follow options which stand in the place of the scale's."""
        return {}

    @classmethod
    def at(cls, scale: "Scale", overrides: Mapping[str, Any]) -> Self:
        """This mixer's configuration at `scale`.

        Raises UserError on an unknown option, naming the nearest, and on one of another type.
        """
        known = {f.name for f in fields(cls)}
        given = {}
        for key, value in overrides.items():
            if key not in known:
                raise unknown_name(f"{cls.__qualname__} option", key, known)
            given[key] = convert(get_type_hints(cls)[key], value, f"{cls.__qualname__}: {key}")
        return cls(**cls.defaults(scale) | cls.following(given) | given)


Extend = TypeVar("Extend", bound=Callable[..., Tensor])


def takes_unnormed(extend: Extend) -> Extend:
    """Mark an `extend` that reads x by one `Projection` and by nothing else.

    It gets the block's input before its norm, `archs.ops.dense.Unnormed`, and the projection
    norms it on the way: in decode that is one launch fewer.
    """
    vars(extend)["takes_unnormed"] = True
    return extend


def asking_losses() -> Shared:
    """What `forward` gets of a caller that trains: mixers leave losses of their own in it."""
    return {LOSSES: []}


def asks_losses(shared: Shared | None) -> bool:
    """Whether the caller trains losses of mixers' own; without it they need not be computed."""
    return shared is not None and LOSSES in shared


def leave_loss(shared: Shared, loss: Tensor) -> None:
    """Leave a loss in nats, a mean over tokens, for a caller that asks for it."""
    shared[LOSSES].append(loss)


def losses_left(shared: Shared) -> list[Tensor]:
    """The losses that mixers left, one for each that has one."""
    return list(shared[LOSSES])


class Mixer(nn.Module):
    """Base class of all token mixers."""

    Config: ClassVar[type[MixerConfig]]
    #: Own parameters that stay in float32 and that weight decay must not touch (decays, steps).
    delicate: ClassVar[frozenset[str]] = frozenset()
    #: Row tensors whose kernels read 8-bit codes, with a scale for each row of a plane.
    coded_rows: frozenset[str] = frozenset()
    #: Row tensors that it reads by `archs.ops.attention.attend` alone: a store may drop rows.
    evictable: frozenset[str] = frozenset()
    #: Which forms of its operations run (`archs.backends`); `Model.use` sets it.
    backend: str = "torch"
    #: How its state is kept; `Model.keep` sets it.
    state_format: StateFormat = StateFormat()

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """The parallel, causal form. x: [B, T, D] -> [B, T, D].

        `shared` carries, by layer index, what one layer computes for others (cross-layer KV), and
        takes losses that a mixer trains parts of its own by (`leave_loss`).
        """
        raise NotImplementedError

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        """K new tokens per sequence after what `state` holds. x: [B, K, D] -> [B, K, D]."""
        raise NotImplementedError

    def state_spec(self) -> StateSpec:
        """What one sequence must remember in this layer, in what this mixer computes in."""
        raise NotImplementedError

    def kept_spec(self) -> StateSpec:
        """The same as it is kept: what a store holds, and a step's bytes are counted of.

        Raises StateFormatError and EvictionError where the format does not fit a tensor.
        """
        return self.state_format.stored(self.state_spec(), self.evictable)

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step in this layer, by operation."""
        raise NotImplementedError

    def initialisers(self) -> dict[str, Initialiser]:
        """Own parameters that a generic normal init would destroy, by local dotted name."""
        return {}

    def axes(self) -> tuple[Axis, ...]:
        """What can be made narrower; of those that shrink the state, the most telling first."""
        return ()


def require_divisible(name: str, value: int, by_name: str, by: int) -> None:
    """Raise the error that names both values and the rule unless `by` divides `value`."""
    if by < 1 or value % by:
        raise UserError(
            f"{name}={value} is not divisible by {by_name}={by}; choose a {by_name} that divides it"
        )
