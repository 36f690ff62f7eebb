"""The decode step compiled by torch: one call instead of a hundred small ones.

At small sizes a step is bound by the calls it makes, not by bytes. `CompiledStep` hands the
whole model, with states reduced to tensors and row numbers, to `torch.compile`; lengths are
symbols, so a growing context compiles nothing anew. It serves plain batches (one length,
adjacent slots, pages at home) and refuses others. Needs a C++ compiler.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.spec import Seen, StateSpec
from infer.table_step import TableStep, rows_last
from infer.view import StepView
from kernels.rope import rope_table

Rotary = tuple[int, float]
TableKey = tuple[int | None, int]

#: Sources of `_step`'s inputs, in torch's notation, that one engine never changes.
STAYS = ("G[", *(f"L['{name}']" for name in ("model", "specs", "layers", "angles")))


class Rows(NamedTuple):
    """Where a table's new rows go in a home range, and how many rows from its start are seen."""

    row: int
    visible: int
    mask: Tensor | None


class Held(NamedTuple):
    """One layer's tensors in the store, by name: rows of its home range, and slots."""

    homes: dict[str, Tensor]
    slots: dict[str, Tensor]


class TracedState:
    """A `LayerState` for one new token per sequence, made of nothing but tensors and numbers."""

    new: Tensor | None = None
    valid: Tensor | None = None
    each: bool = False

    def __init__(
        self,
        held: Held,
        rows: Rows | None,
        start: int,
        angles: dict[Rotary, Tensor],
        device: torch.device,
        owner: "TracedState | None",
    ) -> None:
        self.held = held
        self.rows = rows
        self.start = start
        self.angles = angles
        self.device = device
        self.owner = owner
        self._seen: dict[str, Seen] = {}

    @property
    def positions(self) -> Tensor:
        """As `LayerState.positions`."""
        return torch.arange(self.start, self.start + 1, device=self.device)[None]

    def rope(self, dim: int, theta: float) -> Tensor:
        """As `LayerState.rope`, but real [1, 1, 1, dim/2, 2]."""
        return self.angles[dim, theta]

    def append(self, name: str, rows: Tensor) -> Seen:
        """As `LayerState.append`."""
        home, at = self.held.homes[name], self.rows
        assert at is not None and rows.dtype == home.dtype
        home.narrow(-2, at.row, 1).copy_(rows_last(rows))
        seen = Seen(home.narrow(-2, 0, at.visible), at.mask, False)
        self._seen[name] = seen
        return seen

    def seen(self, name: str) -> Seen:
        """As `LayerState.seen`."""
        return (self.owner or self)._seen[name]

    def get(self, name: str) -> Tensor:
        """As `LayerState.get`; a copy, so that compiled code need not track aliases."""
        return self.held.slots[name].clone()

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        """As `LayerState.put`."""
        assert value.dtype == self.held.slots[name].dtype
        self.held.slots[name].copy_(value)


def _changing(guards: Sequence[Any]) -> list[bool]:
    """The guards worth a check at every step: those on what differs between steps."""
    return [not guard.name.startswith(STAYS) for guard in guards]


def _step(
    model: Model,
    specs: Sequence[StateSpec],
    tokens: Tensor,
    start: int,
    angles: dict[Rotary, Tensor],
    rows: dict[TableKey, Rows],
    layers: Sequence[Held],
) -> Tensor:
    states: list[TracedState] = []
    for spec, held in zip(specs, layers, strict=True):
        owner = None if spec.owner is None else states[spec.owner]
        at = rows[spec.window, spec.sinks] if held.homes else None
        states.append(TracedState(held, at, start, angles, tokens.device, owner))
    return model.extend_last(tokens, states)


class CompiledStep:
    """`Model.extend_last` for one token per sequence, compiled at its first calls.

    Raises UserError for a store with lookback, and at the call for a batch that is not plain or
    a model whose weights have been laid out anew since.
    """

    def __init__(self, model: Model, *, lookback: int) -> None:
        if lookback:
            raise UserError(
                f"lookback={lookback} needs snapshots that a compiled step does not take; "
                "open the engine with compiled=False or lookback=0"
            )
        self.model = model
        self._layout = model.head_weight.stride()
        self._tables: dict[Rotary, Tensor] | None = None
        self._held: dict[tuple[int, int], list[Held]] = {}
        options: dict[str, Any] = {"guard_filter_fn": _changing}
        if model.embedding.weight.device.type == "cpu":
            options["cpp_wrapper"] = True
        # torch keeps what it compiled by code object, up to a limit: each engine has its own.
        own = FunctionType(_step.__code__.replace(), globals(), _step.__name__)
        self._run: Callable[..., Tensor] = torch.compile(own, fullgraph=True, options=options)

    def __call__(self, tokens: Tensor, step: StepView) -> Tensor:
        """Logits [B, V] of tokens [B, 1] in an open step."""
        if self.model.head_weight.stride() != self._layout:
            raise UserError(
                "another engine laid the model's weights out anew after this step was compiled; "
                "open a new engine"
            )
        if not step.plain:
            raise UserError(
                f"sequences of lengths {step.lengths} in slots {step.slots} are no plain batch, "
                "which compiled decode needs (one length, adjacent slots, no forks, no padding); "
                "open the engine with compiled=False"
            )
        rows = {key: _rows(table) for key, table in step.tables.items()}
        if self._tables is None:
            # The first step runs as written and tells which rotary tables the layers ask for.
            logits = self.model.extend_last(tokens, step.layers)
            end = step.store.max_context
            self._tables = {
                (dim, theta): torch.view_as_real(rope_table(end, dim, theta, step.device)[None])
                for dim, theta in step.rotary
            }
            return logits
        # Compiled code writes where it pleases.
        step.wrote_rows = step.wrote_fixed = True
        angles = {key: table.narrow(1, step.start, 1) for key, table in self._tables.items()}
        specs = step.store.specs
        return self._run(self.model, specs, tokens, step.start, angles, rows, self._layers(step))

    def _layers(self, step: StepView) -> list[Held]:
        """The store's tensors as this batch sees them; they stay the same from step to step."""
        first, count = step.slots[0], len(step.slots)
        if (first, count) not in self._held:
            store = step.store
            self._held[first, count] = [
                Held(
                    {name: store.home(index, name, first, count) for name in pools},
                    {name: tensor.narrow(0, first, count) for name, tensor in slots.items()},
                )
                for index, (pools, slots) in enumerate(zip(store.pools, store.slots, strict=True))
            ]
        return self._held[first, count]


def _rows(table: TableStep) -> Rows:
    assert table.row is not None
    return Rows(table.row, *table.visible())
