"""Decode steps compiled by torch: one call instead of a hundred small ones.

At small sizes a step is bound by the calls it makes, not by bytes. `CompiledStep` hands the whole
model, with states reduced to tensors and row numbers, to `torch.compile`; lengths are symbols, so a
growing context compiles nothing anew. Code is compiled for each number of new tokens and each form
of the state (`Shape`). Rows must be at home in adjacent sequences; other steps are refused. Needs a
C++ compiler.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from archs.backbone import Model, Output
from archs.errors import UserError
from infer.books import Rotary
from infer.pages import TableKey
from infer.plan import StepPlan, row_tensor
from infer.pools import LayerTensors
from infer.rows import AtHome, Held, Plain
from infer.state import LayerState
from infer.values import Fixed, InPlace, Slotted, ValueForm
from kernels.rope.torch import rope_table

_NUMBERS = count()

#: Sources of `_step`'s inputs, in torch's notation, that one engine never changes.
STAYS = (
    "G[",
    *(f"L['{name}']" for name in ("model", "layers", "angles", "everywhere", "every_token")),
)


class Whole(NamedTuple):
    """Values that are all of their tensor; copies, so that compiled code need not track aliases."""

    def get(self, pool: Tensor) -> Tensor:
        """As `ValueForm.get`."""
        return pool.clone()

    def put(self, pool: Tensor, value: Tensor, each: Tensor | None) -> None:
        """As `ValueForm.put`."""
        pool.copy_(value)


class Told(NamedTuple):
    """What a step's plan tells of it, in tensors; see `archs.state.LayerState`.

    positions: int64 [1 or B, K]; new: int64 [B]; valid: bool [B, K]; both None: all are valid.
    """

    positions: Tensor
    new: Tensor | None
    valid: Tensor | None
    each: bool


class TracedStep:
    """What all layers share in a step, made of nothing but tensors and numbers."""

    wrote_rows = wrote_fixed = True

    def __init__(
        self, tokens: Tensor, told: Told, angles: Mapping[Rotary, Tensor],
        everywhere: Mapping[Rotary, Tensor],
    ) -> None:  # fmt: skip
        self.batch, self.new_tokens = tokens.shape
        self.positions, self.new, self.valid, self.each = told
        self.angles = angles
        self.everywhere = everywhere

    @property
    def past(self) -> Tensor:
        """As `LayerState.past`."""
        return self.positions[:, 0].int().expand(self.batch)

    def rope(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `LayerState.rope`, but real [1 or B, K, 1, dim/2, 2]."""
        return self.angles[dim, theta, turned]

    def rotary(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `LayerState.rotary`."""
        return self.everywhere[dim, theta, turned]


class Shape(NamedTuple):
    """What steps of one compiled code have in common: all but sizes.

    single: whether the batch is one sequence. masked: whether each table's form has a mask.
    stores: whether each table gains rows, for one row may come with several tokens: torch compiles
    anew where there are none, and one code only up to a limit.
    deterministic: whether torch's deterministic algorithms are asked for.
    """

    new_tokens: int
    every_token: bool
    single: bool
    uniform: bool
    full: bool
    rows: tuple[type, ...]
    masked: tuple[bool, ...]
    stores: tuple[bool, ...]
    values: type
    deterministic: bool


def _changing(guards: Sequence[Any]) -> list[bool]:
    """The guards worth a check at every step: those on what differs between steps."""
    return [not guard.name.startswith(STAYS) for guard in guards]


def _step(
    model: Model,
    tokens: Tensor,
    told: Told,
    angles: Mapping[Rotary, Tensor],
    everywhere: Mapping[Rotary, Tensor],
    tables: Mapping[TableKey, Plain | AtHome],
    values: ValueForm,
    layers: Sequence[LayerTensors],
    hidden: Tensor | None,
    every_token: bool,
) -> Output:
    """angles: of the new tokens; everywhere: of all positions. layers: their tensors as the batch
    sees them: home rows, and values in place or in slots.
    """
    step = TracedStep(tokens, told, angles, everywhere)
    states: list[LayerState] = []
    for index, layer in enumerate(layers):
        rows = {
            name: row_tensor(layer, name, Held(home, home), tables[key], step.new_tokens)
            for name, (key, home, _) in layer.rows.items()
        }
        owners = {name: states[owner] for name, owner in layer.lent.items()}
        fixed = Fixed(layer.fixed, layer.inputs, values, None, layer.codings, layer.keeps)
        states.append(LayerState(step, index, rows, fixed, owners))
    return model.step(tokens, states, hidden, every_token=every_token)


class CompiledStep:
    """`Model.step` for a few tokens per sequence, compiled at its first calls.

    Raises UserError at the call for sequences whose rows lie apart, and for a model whose weights
    have been laid out anew since.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._layout = model.head_weight.stride()
        self._tables: dict[Rotary, Tensor] | None = None
        self._everywhere: dict[Rotary, Tensor] = {}
        self._layers: dict[tuple[int, int, int | None], list[LayerTensors]] = {}
        self._code: dict[Shape, Callable[..., Output]] = {}

    def __call__(
        self, tokens: Tensor, step: StepPlan, hidden: Tensor | None = None, *, every_token: bool
    ) -> Output:
        """What an open step gives for tokens [B, K]."""
        if self.model.head_weight.stride() != self._layout:
            raise UserError(
                "another engine laid the model's weights out anew after this step was compiled; "
                "open a new engine"
            )
        if not step.at_home:
            raise UserError(
                f"sequences {step.sequences} of lengths {step.lengths} lie apart, and compiled "
                "decode needs their rows side by side (adjacent sequences, no forks, no step "
                "longer than a window's ring); open the engine with compiled=False"
            )
        if self._tables is None:
            # The first step runs as written and tells which rotary tables the layers ask for.
            found = self.model.step(tokens, step.layers, hidden, every_token=every_token)
            end = step.store.max_context
            self._tables = {
                asked: torch.view_as_real(rope_table(end, *asked[:2], step.device, asked[2])[None])
                for asked in step.asked
            }
            self._everywhere = dict(step.store.on_device.angles)
            return found
        # Compiled code writes where it pleases.
        step.wrote_rows = step.wrote_fixed = True
        step.start_copies()
        told = Told(step.positions, step.new, step.valid, step.each)
        if step.uniform and step.full:
            angles = {
                key: table.narrow(1, step.start, step.new_tokens)
                for key, table in self._tables.items()
            }
        else:
            # Positions of padding may lie past the last row.
            at = told.positions.clamp(max=step.store.max_context - 1)
            angles = {key: table[0][at] for key, table in self._tables.items()}
        tables = {key: table.form_at_home() for key, table in step.tables.items()}
        values: ValueForm = Whole()
        if isinstance(step.values, Slotted):
            values = step.values.indexed
        shape = Shape(
            step.new_tokens, every_token, step.batch == 1, step.uniform, step.full,
            tuple(type(form) for form in tables.values()),
            tuple(form.mask is not None for form in tables.values()),
            tuple(not isinstance(form, Plain) or form.new > 0 for form in tables.values()),
            type(values),
            torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        if shape not in self._code:
            self._code[shape] = self._compiled(shape)
        run_compiled = self._code[shape]
        layers = self._layers_of(step)
        return run_compiled(
            self.model, tokens, told, angles, self._everywhere, tables, values, layers, hidden,
            every_token,
        )  # fmt: skip

    def _compiled(self, shape: Shape) -> Callable[..., Output]:
        # torch 2.13 frees a tensor twice where its C++ wrapper writes by index under deterministic
        # algorithms.
        on_cpu = self.model.embedding.weight.device.type == "cpu"
        wrapped = on_cpu and not shape.deterministic
        options: dict[str, Any] = {"guard_filter_fn": _changing, "cpp_wrapper": wrapped}
        # torch keeps what it compiled by code object, up to a limit, and by name which sizes differ
        # between calls: each shape of each engine has both of its own.
        code = _step.__code__.replace(co_name=f"{_step.__name__}_{next(_NUMBERS)}")
        own = FunctionType(code, globals(), code.co_name)
        return torch.compile(own, fullgraph=True, options=options)

    def _layers_of(self, step: StepPlan) -> list[LayerTensors]:
        """The store's tensors as this batch sees them; they stay the same from step to step."""
        first, batch = step.sequences[0], step.batch
        slot = step.values.first if isinstance(step.values, InPlace) else None
        if (first, batch, slot) not in self._layers:
            store = step.store
            self._layers[first, batch, slot] = [
                LayerTensors(
                    {
                        name: (key, store.pools.home(index, name, first, batch), shape)
                        for name, (key, _, shape) in layer.rows.items()
                    },
                    layer.lent,
                    layer.fixed if slot is None
                    else {name: v.narrow(0, slot, batch) for name, v in layer.fixed.items()},
                    layer.inputs, layer.codings, layer.blocks, layer.scales, layer.keeps,
                )
                for index, layer in enumerate(store.pools.layers)
            ]  # fmt: skip
        return self._layers[first, batch, slot]
