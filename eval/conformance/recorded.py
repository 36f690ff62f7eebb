"""A layer's state as the kit hands it out: every use is held to what the layer declares.

`Recorded` passes everything on to the store's own state. Rows and fixed tensors come as copies,
so that a `Tally` sees which of their bytes a mixer reads.
"""

from dataclasses import dataclass, field

from torch import Tensor

from archs.spec import LayerState, Rows, Seen, StateSpec, TensorSpec
from eval.conformance.tally import Tally, Watched
from eval.conformance.verdict import StateFault, short


@dataclass(slots=True)
class Use:
    """What one declared tensor was used for: its rows or value read, and stored."""

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

    def __init__(self, inner: LayerState, spec: StateSpec, tally: Tally, tokens: int) -> None:
        self.inner = inner
        self.spec = spec
        self.tally = tally
        self.tokens = tokens
        self.uses = {t.name: Use() for t in (*spec.per_token, *spec.fixed)}
        self.new = inner.new
        self.valid = inner.valid
        self.each = inner.each

    @property
    def positions(self) -> Tensor:
        """As `LayerState.positions`."""
        with self.tally.pause():
            return self.inner.positions

    def rope(self, dim: int, theta: float) -> Tensor:
        """As `LayerState.rope`."""
        with self.tally.pause():
            return self.inner.rope(dim, theta)

    def append(self, name: str, rows: Tensor) -> Rows:
        """As `LayerState.append`."""
        declared = self._declared(name, self.spec.per_token, "append")
        if self.spec.owner is not None:
            raise StateFault(f"appends '{name}', whose owner is layer {self.spec.owner}")
        self._hold(rows, declared, (rows.shape[0], self.tokens, *declared.shape), "append")
        self.uses[name].stored = True
        self.tally.state_write_bytes += rows.nbytes
        with self.tally.pause():
            return self._watch(name, self.inner.append(name, rows))

    def seen(self, name: str) -> Rows:
        """As `LayerState.seen`."""
        self._declared(name, self.spec.per_token, "seen")
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

    def _declared(self, name: str, tensors: tuple[TensorSpec, ...], verb: str) -> TensorSpec:
        for tensor in tensors:
            if tensor.name == name:
                return tensor
        kind = "per_token" if tensors is self.spec.per_token else "fixed"
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
        if got.dtype != spec.dtype:
            raise StateFault(
                f"state.{verb}('{spec.name}') stores {short(got.dtype)} where "
                f"{short(spec.dtype)} is declared: a silent cast; declare {short(got.dtype)}, "
                "or cast before you store"
            )
