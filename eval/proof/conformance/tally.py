"""Count what a step does where torch dispatches it, without looking at any declaration.

A `Tally` marks every byte of the watched tensors that an operation reads, and counts FLOPs by
kind. Views read nothing; a gather reads what it returns. Of a state that is read whole in the same
step, gathers read nothing more.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention.torch import FLOP_FORMULAS

GATHERS = frozenset({"embedding", "index", "index_select", "gather", "take"})
#: Operations that overwrite their first operand without reading it.
OVERWRITES = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_"})
#: Operations that ask for a shape or a view only, though torch does not call them views.
READ_NOTHING = frozenset(
    {"_unsafe_view", "_reshape_alias", "empty_like", "zeros_like", "ones_like", "full_like",
     "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"}
)  # fmt: skip
#: Operations that torch tags as pointwise, but that compute nothing.
MOVES = frozenset({"clone", "where", "masked_fill", "masked_fill_", "_to_copy", "copy_"})
#: FLOPs of one element of the result, where that is not one.
PER_OUTPUT = {"silu": 5, "silu_": 5, "addcmul": 2, "addcmul_": 2, "softplus": 3, "gelu": 8,
              "_softmax": 5, "_log_softmax": 5}  # fmt: skip
#: FLOPs of one element that is reduced.
PER_INPUT = {"sum": 1, "mean": 1, "cumsum": 1, "amax": 1, "amin": 1, "prod": 1, "logsumexp": 3,
             "linalg_vector_norm": 2, "var": 3, "std": 3}  # fmt: skip
COMPLEX_PRODUCT_FLOPS = 6
#: By operation, FLOPs of matrix products and fused attention from their arguments.
MATRIX_FLOPS = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS).flop_registry
FUSED_ATTENTION = "_scaled_dot_product"
GEMMS = frozenset({"mm", "addmm", "bmm", "baddbmm"})


@dataclass(slots=True, eq=False)
class Watched:
    """A tensor whose bytes are marked as they are read; `gathered_bytes` counts gathers apart."""

    tensor: Tensor
    gathered_bytes: int = 0
    _read: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._read = torch.zeros(self.tensor.untyped_storage().nbytes(), dtype=torch.bool)

    @property
    def read_bytes(self) -> int:
        """Distinct bytes that were read, and what gathers returned."""
        return int(self._read.sum()) + self.gathered_bytes

    @property
    def once_bytes(self) -> int:
        """As `read_bytes`; gathers from a tensor that is read whole add nothing."""
        return len(self._read) if self._read.all() else self.read_bytes

    def mark(self, view: Tensor) -> None:
        """An operation read this view of the tensor."""
        item = view.element_size()
        pairs = list(zip(view.shape, view.stride(), strict=True))
        # An expanded dimension is the same memory again.
        size = [n if stride else min(n, 1) for n, stride in pairs]
        strides = [stride * item for _, stride in pairs]
        at = view.storage_offset() * item
        self._read.as_strided((*size, item), (*strides, 1), at).fill_(True)


class Tally(TorchDispatchMode):
    """Counts what runs inside it.

    matrix_flops: by the formulas of torch's FLOP counter. vector_flops: other arithmetic, to first
    order. weight_flops: of matrix_flops, products with a watched weight; weight_flop_rows: their
    FLOPs times the rows that each weight is multiplied with.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {_place(w): Watched(w) for w in weights}
        self.state: dict[int, Watched] = {}
        self.vector_flops = 0
        self.weight_flops = 0
        self.weight_flop_rows = 0
        self.state_write_bytes = 0
        self.matrix_flops = 0
        self._paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs in this block is not counted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that were read, each once."""
        return sum(w.read_bytes for w in self.weights.values())

    @property
    def state_read_bytes(self) -> int:
        """Bytes of watched state that were read, each once."""
        return sum(w.once_bytes for w in self.state.values())

    def watch_state(self, tensor: Tensor) -> Watched:
        """Watch a tensor with a storage of its own from now on."""
        return self.state.setdefault(_place(tensor), Watched(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = MATRIX_FLOPS.get(func.overloadpacket)
        if formula is None:
            # Composite operations are taken apart, and their parts are seen here.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.matrix_flops += formula(*args, **kwargs, out_val=out)
        name = func.overloadpacket.__name__
        if not self._paused and not func.is_view and name not in READ_NOTHING:
            self._reads(name, args, kwargs, out)
            self.vector_flops += _vector_flops(func, name, args, out)
        return out

    def _reads(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        written = args[:1] if name in OVERWRITES else ()
        inputs = tree_leaves(
            (args[len(written) :], {k: v for k, v in kwargs.items() if k != "out"})
        )
        for i, tensor in enumerate(t for t in inputs if isinstance(t, Tensor)):
            place = _place(tensor)
            watched = self.weights.get(place) or self.state.get(place)
            if watched is None:
                continue
            if name in GATHERS and i == 0:
                watched.gathered_bytes += out.nbytes
            else:
                watched.mark(tensor)
            if name in GEMMS and place in self.weights:
                flops = 2 * _rows_beside(tensor, args) * tensor.numel()
                self.weight_flops += flops
                self.weight_flop_rows += flops * (flops // (2 * _distinct(tensor)))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _distinct(tensor: Tensor) -> int:
    """Elements of a tensor, those of expanded dimensions once."""
    return prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _rows_beside(weight: Tensor, args: Any) -> int:
    """Rows that a GEMM multiplies its weight with, in each of its batches."""
    a, b = [t for t in args if isinstance(t, Tensor)][-2:]
    return int(b.shape[-1] if weight is a else a.shape[-2])


def _vector_flops(func: Any, name: str, args: Any, out: Any) -> int:
    if name.startswith(FUSED_ATTENTION):
        q, k = args[:2]
        return PER_OUTPUT["_softmax"] * prod(q.shape[:3]) * k.shape[-2]
    if name in PER_INPUT:
        return PER_INPUT[name] * args[0].numel()
    pointwise = torch.Tag.pointwise in func.tags and name not in MOVES
    if not isinstance(out, Tensor) or not (pointwise or name in PER_OUTPUT):
        return 0
    if out.is_complex():
        return COMPLEX_PRODUCT_FLOPS * out.numel()
    return PER_OUTPUT.get(name, 1) * out.numel() if out.is_floating_point() else 0
