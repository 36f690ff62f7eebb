"""What a layer gives is what it declared: a store casts nothing and broadcasts nothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from archs.errors import UserError


def require_fit(layer: int, name: str, given: Tensor, shape: Sequence[int], held: Tensor) -> None:
    """Raise UserError unless `given` has this shape and the dtype of the store's tensor."""
    if given.shape != tuple(shape):
        raise UserError(
            f"layer {layer} gives '{name}' of shape {list(given.shape)} where this step and its "
            f"state_spec say {list(shape)}; make both agree"
        )
    require_dtype(layer, name, given.dtype, held)


def require_dtype(layer: int, name: str, dtype: torch.dtype, held: Tensor) -> None:
    """Raise UserError unless the store's tensor has this dtype."""
    if dtype != held.dtype:
        raise UserError(
            f"layer {layer} gives '{name}' in {dtype} and its state_spec declares {held.dtype}; "
            "declare what the mixer gives, or convert in the mixer"
        )


def rows_shape(pool: Tensor) -> tuple[int, ...]:
    """The shape of one token's row in a pool [*planes, rows, row]."""
    return (*pool.shape[:-2], pool.shape[-1])
