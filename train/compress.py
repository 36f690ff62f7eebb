"""Store a trained model's weights in few bits, with calibration text where a way needs it.

Block by block: the block's inputs are those that the blocks before it give as they are stored, so
each makes up for what came before. Nothing is trained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archs.backbone import Block, Model, cast
from archs.errors import UserError
from archs.layers import Projection
from archs.mixer import Shared
from archs.ops.matrix import rows_of
from archs.packed import Plain
from archs.storage import Choice, Chosen, store, store_ends, store_projections
from archs.weights import Number, WeightFormat
from train.rounding import WAYS, Inputs

#: Tokens of calibration text that go through a block at once.
PIECE = 4096
#: Fewest rows of inputs for each column of a matrix: with fewer their moments have no inverse.
ROWS_A_COLUMN = 1


class Observed(Plain):
    """A plain matrix that keeps account of what it is multiplied with."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.inputs = Inputs.none(weight.shape[1], weight.device)

    def product(self, x: Tensor, *, backend: str) -> Tensor:
        """As `Matrix.product`."""
        self.inputs.add(x)
        return super().product(x, backend=backend)


@dataclass(slots=True)
class _Piece:
    """Some sequences on their way through the model: the stream's summands, and what is shared."""

    x: Tensor
    residual: Tensor | None
    shared: Shared


@torch.no_grad()
def compress(model: Model, stored: WeightFormat, ids: Tensor | None = None) -> Model:
    """Store a model of plain float32 weights, in place.

    ids: calibration text, int64 [B, T]; None where codes are the nearest ones. Raises UserError
    where text is missing or too short for the model's matrices, and as `store`.
    """
    if stored.method not in WAYS:
        return store(model, stored)
    if ids is None:
        raise UserError(f"'{stored}' chooses codes by calibration text; give some, or leave out "
                        f"{stored.method}")  # fmt: skip
    require_enough(model, ids.numel(), stored.method)
    way = WAYS[stored.method]
    store_ends(model, stored)
    pieces = [
        _Piece(rows_of(model.embedding.weight, part, torch.float32), None, {})
        for part in ids.split(max(1, PIECE // ids.shape[1]))
    ]
    for block in model.layers:
        with observed(block) as seen:
            for piece in pieces:
                block(piece.x, piece.residual, dict(piece.shared))
        store_projections(block, stored, _choice(way, seen))
        for piece in pieces:
            piece.x, piece.residual = block(piece.x, piece.residual, piece.shared)
    model.weight_format = str(stored)
    return cast(model, stored.dtype)


def _choice(way: Callable[[Tensor, Number, Inputs], Chosen], seen: dict[str, Inputs]) -> Choice:
    def choose(name: str, weight: Tensor, number: Number) -> Chosen:
        return way(weight, number, seen[name])

    return choose


def require_enough(model: Model, tokens: int, method: str) -> None:
    """Raise UserError where text is too short to tell the inputs of the widest matrix apart."""
    widest = max(m.in_features for m in model.modules() if isinstance(m, Projection))
    needed = ROWS_A_COLUMN * widest
    if tokens < needed:
        raise UserError(
            f"{tokens} tokens of calibration text are too few for {method}: the widest matrix has "
            f"{widest} columns; give {needed} or more"
        )


@contextmanager
def observed(block: Block) -> Iterator[dict[str, Inputs]]:
    """Within it the block's projections keep account of their inputs, by name."""
    held: list[tuple[Projection, nn.Parameter]] = []
    seen: dict[str, Inputs] = {}
    try:
        for name, projection in list(block.named_modules()):
            if not isinstance(projection, Projection):
                continue
            weight = projection.stored
            if isinstance(weight, nn.Parameter):
                watching = Observed(weight)
                held.append((projection, weight))
                projection.store(watching)
                seen[name] = watching.inputs
        yield seen
    finally:
        for projection, weight in held:
            projection.store(weight)
