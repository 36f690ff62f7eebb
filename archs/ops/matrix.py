"""Weights as products see them: a plain tensor, or a `Matrix` that holds them in another way."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from archs.formats import Format


class Matrix(nn.Module):
    """Weights [N, K] that are no plain tensor; what it shares with one it names as a tensor does.

    dtype: of the rows and products that it gives.
    """

    dtype: torch.dtype

    def product(self, x: Tensor, *, backend: str) -> Tensor:
        """x Wᵀ: [..., K] -> [..., N], in x's dtype; x is `dtype`, or wider for an exact product."""
        raise NotImplementedError

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows by number, as an embedding reads them: int64 [...] -> [..., K], in its own dtype
        unless another is named.
        """
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All numbers, [N, K], computed in `dtype`."""
        raise NotImplementedError

    def give(self, dtype: torch.dtype) -> None:
        """Give rows and products in another dtype from now on."""

    def lay_out(self) -> None:
        """Store the numbers as products of this device read them; they stay what they are."""

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        raise NotImplementedError

    @property
    def declared_bytes(self) -> int:
        """Bytes that the format says, scales included."""
        raise NotImplementedError

    @property
    def storage(self) -> str:
        """The name of the format that most of the numbers have: products of one have one speed."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that hold the numbers."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @property
    def device(self) -> torch.device:
        """Where the numbers lie."""
        return next(t.device for t in (*self.buffers(), *self.parameters()))

    def stride(self) -> tuple[int, ...]:
        """None: once laid out, it stays as it is, whatever reads it."""
        return ()

    def data_ptr(self) -> int:
        """Where the first of its tensors lies."""
        return next(t.data_ptr() for t in (*self.buffers(), *self.parameters()))

    def numel(self) -> int:
        """N · K."""
        return self.shape.numel()


#: What a product multiplies by.
Weight = Tensor | Matrix


def rows_of(weight: Weight, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `Matrix.rows`."""
    if isinstance(weight, Matrix):
        return weight.rows(index, dtype)
    return nn.functional.embedding(index, weight).to(dtype or weight.dtype)


def dense(weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """All numbers as a plain tensor, [N, K]; in the weight's own dtype unless another is named."""
    if isinstance(weight, Matrix):
        return weight.dense(dtype or weight.dtype)
    return weight if dtype is None else weight.to(dtype)


def weights_of(model: nn.Module) -> Iterator[Weight]:
    """A model's weights, each once: plain parameters, and matrices that are stored in few bits."""
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, Matrix) and id(module) not in inside:
            inside |= {id(part) for part in module.modules()}
            inside |= {id(part) for part in module.parameters()}
            yield module
    for parameter in model.parameters():
        if id(parameter) not in inside:
            yield parameter


def declared_bytes(weight: Weight) -> int:
    """Bytes that a weight's format says, scales included."""
    if isinstance(weight, Matrix):
        return weight.declared_bytes
    return Format.of(weight.dtype).nbytes(weight.numel())


def storages_of(model: nn.Module) -> list[str]:
    """Names of the formats of a model's weights, plain numbers by ""."""
    return sorted({"", *(storage_of(weight) for weight in weights_of(model))})


def storage_of(weight: Weight) -> str:
    """As `Projection.storage`."""
    return weight.storage if isinstance(weight, Matrix) else ""
