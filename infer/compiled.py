"""The decode step compiled by torch: one call instead of a hundred small ones.

At small sizes a step is bound by the calls it makes, not by bytes. `CompiledStep` hands the
whole model, with states reduced to tensors and row numbers, to `torch.compile`; lengths are
symbols, so a growing context compiles nothing anew. It serves plain batches (one length,
adjacent, at home) and refuses others. Needs a C++ compiler.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from infer.pages import TableKey
from infer.plan import StepPlan
from infer.pools import LayerTensors
from infer.rows import Held, Plain
from infer.state import InPlace, LayerState, RowTensor
from kernels.rope import rope_table

Rotary = tuple[int, float]

#: Sources of `_step`'s inputs, in torch's notation, that one engine never changes.
STAYS = ("G[", *(f"L['{name}']" for name in ("model", "layers", "angles")))


class Whole(NamedTuple):
    """Values that are all of their tensor; copies, so that compiled code need not track aliases."""

    def get(self, pool: Tensor) -> Tensor:
        """As `ValueForm.get`."""
        return pool.clone()

    def put(self, pool: Tensor, value: Tensor, each: Tensor | None) -> None:
        """As `ValueForm.put`."""
        pool.copy_(value)


class TracedStep:
    """What all layers share in a step of one token, made of nothing but tensors and numbers."""

    new_tokens = 1
    new: Tensor | None = None
    valid: Tensor | None = None
    each = False
    wrote_rows = wrote_fixed = True

    def __init__(self, tokens: Tensor, start: int, angles: dict[Rotary, Tensor]) -> None:
        self.batch = tokens.shape[0]
        self.start = start
        self.angles = angles
        self.device = tokens.device

    @property
    def past(self) -> Tensor:
        """As `LayerState.past`."""
        return torch.full((self.batch,), self.start, dtype=torch.int32, device=self.device)

    @property
    def positions(self) -> Tensor:
        """As `LayerState.positions`."""
        return torch.arange(self.start, self.start + 1, device=self.device)[None]

    def rope(self, dim: int, theta: float) -> Tensor:
        """As `LayerState.rope`, but real [1, 1, 1, dim/2, 2]."""
        return self.angles[dim, theta]

    def rotary(self, dim: int, theta: float) -> Tensor:
        """Kernels ask for it, and none are compiled here."""
        raise NotImplementedError


def _changing(guards: Sequence[Any]) -> list[bool]:
    """The guards worth a check at every step: those on what differs between steps."""
    return [not guard.name.startswith(STAYS) for guard in guards]


def _step(
    model: Model,
    tokens: Tensor,
    start: int,
    angles: dict[Rotary, Tensor],
    tables: dict[TableKey, Plain],
    layers: Sequence[LayerTensors],
) -> Tensor:
    """layers: their tensors as the batch sees them: home rows, and values in place."""
    step = TracedStep(tokens, start, angles)
    states: list[LayerState] = []
    for index, layer in enumerate(layers):
        rows = {
            name: RowTensor(Held(home, home), tables[key], (1, *shape))
            for name, (key, home, shape) in layer.rows.items()
        }
        owners = {name: states[owner] for name, owner in layer.lent.items()}
        states.append(LayerState(step, index, rows, layer.fixed, Whole(), owners))
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
        self._layers: dict[tuple[int, int, int], list[LayerTensors]] = {}
        options: dict[str, Any] = {"guard_filter_fn": _changing}
        if model.embedding.weight.device.type == "cpu":
            options["cpp_wrapper"] = True
        # torch keeps what it compiled by code object, up to a limit: each engine has its own.
        own = FunctionType(_step.__code__.replace(), globals(), _step.__name__)
        self._run: Callable[..., Tensor] = torch.compile(own, fullgraph=True, options=options)

    def __call__(self, tokens: Tensor, step: StepPlan) -> Tensor:
        """Logits [B, V] of tokens [B, 1] in an open step."""
        if self.model.head_weight.stride() != self._layout:
            raise UserError(
                "another engine laid the model's weights out anew after this step was compiled; "
                "open a new engine"
            )
        if not step.plain:
            raise UserError(
                f"sequences {step.sequences} of lengths {step.lengths} are no plain batch, "
                "which compiled decode needs (one length, adjacent, no forks, no padding); "
                "open the engine with compiled=False"
            )
        tables = {key: table.plain for key, table in step.tables.items()}
        if self._tables is None:
            # The first step runs as written and tells which rotary tables the layers ask for.
            logits = self.model.extend_last(tokens, step.layers)
            end = step.store.max_context
            self._tables = {
                (dim, theta): torch.view_as_real(rope_table(end, dim, theta, step.device)[None])
                for dim, theta in step.asked
            }
            return logits
        # Compiled code writes where it pleases.
        step.wrote_rows = step.wrote_fixed = True
        step.start_copies()
        angles = {key: table.narrow(1, step.start, 1) for key, table in self._tables.items()}
        layers = self._layers_of(step)
        return self._run(self.model, tokens, step.start, angles, tables, layers)

    def _layers_of(self, step: StepPlan) -> list[LayerTensors]:
        """The store's tensors as this batch sees them; they stay the same from step to step."""
        first, count = step.sequences[0], len(step.sequences)
        slot = step.values.first if isinstance(step.values, InPlace) else 0
        if (first, slot, count) not in self._layers:
            store = step.store
            self._layers[first, slot, count] = [
                LayerTensors(
                    {
                        name: (key, store.pools.home(index, name, first, count), shape)
                        for name, (key, _, shape) in layer.rows.items()
                    },
                    layer.lent,
                    {name: value.narrow(0, slot, count) for name, value in layer.fixed.items()},
                )
                for index, layer in enumerate(store.pools.layers)
            ]
        return self._layers[first, slot, count]
