"""A layer's state that checks every use against the layer's declaration.

`Recorded` passes everything on to the store's own state. Rows and fixed tensors come as copies,
so that a `Tally` sees which of their bytes a mixer reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from archs.spec import StateSpec, TensorSpec
from archs.state import LayerState, Pages, Replayed, Rows, Seen, Slots
from eval.proof.conformance.tally import Tally, Watched
from eval.proof.conformance.verdict import StateFault, short

Declared = TypeVar("Declared", bound=TensorSpec)


@dataclass(slots=True)
class Use:
    """How one declared tensor was used: its rows or value read, and stored."""

    stored: bool = False
    reads: list[Watched] = field(default_factory=list)

    @property
    def read(self) -> bool:
        """Whether an operation has read any of it."""
        return any(w.read_bytes for w in self.reads)


class Recorded:
    """A `LayerState` that passes everything on and holds it to the layer's declaration.

    Raises StateFault on names, shapes and dtypes that the layer does not declare.
    """

    def __init__(
        self, inner: LayerState, spec: StateSpec, tally: Tally, *, context: int, tokens: int
    ) -> None:
        self.inner = inner
        self.spec = spec
        self.tally = tally
        self.context = context
        self.tokens = tokens
        self.uses = {t.name: Use() for t in (*spec.rows, *spec.fixed)}
        self.new = inner.new
        self.valid = inner.valid
        self.each = inner.each
        self.past = inner.past

    @property
    def positions(self) -> Tensor:
        """As `LayerState.positions`."""
        with self.tally.pause():
            return self.inner.positions

    def rope(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `LayerState.rope`."""
        with self.tally.pause():
            return self.inner.rope(dim, theta, turned)

    def append(self, name: str, rows: Tensor) -> Rows:
        """As `LayerState.append`."""
        declared = self._declared(name, self.spec.rows, "append")
        if declared.owner is not None:
            raise StateFault(f"appends '{name}', whose owner is layer {declared.owner}")
        batch, new = rows.shape[0], -(-self.tokens // declared.every)
        self._hold(rows, declared, (batch, new, *declared.shape), "append")
        self.uses[name].stored = True
        complete = declared.new_rows(self.context, self.tokens)
        self.tally.state_write_bytes += rows.nbytes // new * complete
        with self.tally.pause():
            return self._watch(name, self.inner.append(name, rows))

    def seen(self, name: str) -> Rows:
        """As `LayerState.seen`."""
        self._declared(name, self.spec.rows, "seen")
        with self.tally.pause():
            return self._watch(name, self.inner.seen(name))

    def get(self, name: str) -> Tensor:
        """As `LayerState.get`."""
        self._declared(name, self.spec.fixed, "get")
        with self.tally.pause():
            value = self.inner.get(name).clone()
        self.uses[name].reads.append(self.tally.watch_state(value))
        return value

    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None:
        """As `LayerState.put`."""
        declared = self._declared(name, self.spec.fixed, "put")
        self._hold(value, declared, (value.shape[0], *declared.shape), "put")
        self.uses[name].stored = True
        self.tally.state_write_bytes += value.nbytes
        with self.tally.pause():
            self.inner.put(name, value, each)

    def _watch(self, name: str, seen: Rows) -> Rows:
        rows = seen.rows.clone()
        self.uses[name].reads.append(self.tally.watch_state(rows))
        return Seen(rows, seen.mask, seen.causal)

    # Kernels take what lies in the store itself; the kit runs the torch forms.

    def rotary(self, dim: int, theta: float, turned: int | None = None) -> Tensor:
        """As `LayerState.rotary`."""
        return self.inner.rotary(dim, theta, turned)

    def pages(self, name: str, dtype: torch.dtype) -> Pages | None:
        """As `LayerState.pages`."""
        return self.inner.pages(name, dtype)

    def written(self, name: str) -> Rows:
        """As `LayerState.written`."""
        return self.inner.written(name)

    def slots(self, name: str) -> Slots:
        """As `LayerState.slots`."""
        return self.inner.slots(name)

    def replayed(self, name: str) -> Replayed | None:
        """As `LayerState.replayed`; the kit counts steps of a store that keeps copies."""
        return self.inner.replayed(name)

    def _declared(self, name: str, tensors: Sequence[Declared], verb: str) -> Declared:
        for tensor in tensors:
            if tensor.name == name:
                return tensor
        kind = "row" if tensors is self.spec.rows else "fixed"
        known = ", ".join(t.name for t in tensors) or "none"
        raise StateFault(
            f"state.{verb}('{name}'): state_spec declares no {kind} tensor of that name "
            f"({kind}: {known}); declare it"
        )

    def _hold(self, got: Tensor, spec: TensorSpec, shape: tuple[int, ...], verb: str) -> None:
        if tuple(got.shape) != shape:
            raise StateFault(
                f"state.{verb}('{spec.name}') stores {list(got.shape)}, declared {list(shape)}"
            )
        stored = spec.format.dtype
        if got.dtype != stored:
            raise StateFault(
                f"state.{verb}('{spec.name}') stores {short(got.dtype)} where "
                f"{short(stored)} is declared: a silent cast; declare {short(got.dtype)}, "
                "or cast before you store"
            )
