"""The tensors of a store: a pool for every row tensor and every fixed tensor of every layer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from archs.spec import FixedSpec, Keeping, RowSpec, StateSpec, TensorSpec
from infer.coding import Coding, held_dtype, held_shape
from infer.pages import PageTable, TableKey
from infer.rings import RingTable
from infer.slots import SlotTable

#: Tensors of a layer that draw random numbers of their own.
SALTS = 16


class LayerTensors(NamedTuple):
    """The tensors of one layer in the store, by name.

    rows: of its own: their block table, their pool [*planes, rows, row] and a row's shape.
    lent: the layers that own the others. fixed: pools [slots, *shape]. inputs: of those that are
    replayed, pools [slots, R, row]. codings: of tensors that are stored otherwise than they come.
    blocks: the fixed tensors in which rows wait until a block of them is stored. scales: of rows
    whose codes kernels read, pools [*planes, rows, 1]; those rows' pools hold nothing but codes.
    keeps: of fixed tensors that are rows of a mixer.
    """

    rows: dict[str, tuple[TableKey, Tensor, tuple[int, ...]]]
    lent: dict[str, int]
    fixed: dict[str, Tensor]
    inputs: dict[str, Tensor]
    codings: dict[str, Coding]
    blocks: dict[str, str]
    scales: dict[str, Tensor]
    keeps: dict[str, Keeping]

    @property
    def row_pools(self) -> Iterator[tuple[TableKey, Tensor]]:
        """Every pool behind a block table, [*planes, rows, ·]."""
        for name, (key, pool, _) in self.rows.items():
            yield key, pool
            if name in self.scales:
                yield key, self.scales[name]


class Pools:
    """Rows of one plane (a head of K, say) lie together; values lie in slots.

    page_bytes: of a page of each block table, in the pools of all its tensors; slot_bytes: of a
    slot in those of all fixed tensors that are kept in copies; ring_bytes: of one in those of all
    that are replayed. All are counted from the tensors.
    kernels: whether kernels read them where they lie.
    """

    def __init__(
        self, specs: Sequence[StateSpec], tables: Mapping[TableKey, PageTable],
        slots: SlotTable | None, rings: RingTable | None, device: torch.device, kernels: bool,
    ) -> None:  # fmt: skip
        self._tables = tables
        self._slots = slots
        self._rings = rings
        self._device = device
        self._kernels = kernels
        self.layers = [self._layer(index, spec) for index, spec in enumerate(specs)]
        self.page_bytes = {key: self._bytes_of_a_page(key) for key in tables}
        self.slot_bytes = self.ring_bytes = 0
        for layer in self.layers:
            for name, pool in layer.fixed.items():
                if name in layer.inputs:
                    self.ring_bytes += pool[0].nbytes + layer.inputs[name][0].nbytes
                else:
                    self.slot_bytes += pool[0].nbytes
        self._homes: dict[tuple[int, str, int, int], Tensor] = {}

    def home(self, layer: int, name: str, first: int, count: int) -> Tensor:
        """The home rows of `count` sequences from `first` on, [count, *planes, home_rows, row].

        A view of the pool, made once: a small decode step is bound by the calls it makes.
        """
        at = layer, name, first, count
        found = self._homes.get(at)
        if found is None:
            key, pool, _ = self.layers[layer].rows[name]
            table = self._tables[key]
            pool = pool.narrow(-2, 0, table.n_pages * table.page_size)
            homes = pool.unflatten(-2, (-1, table.home_rows)).narrow(-3, first, count)
            self._homes[at] = found = homes.movedim(-3, 0)
        return found

    def _layer(self, index: int, spec: StateSpec) -> LayerTensors:
        tensors = [*spec.owned, *spec.fixed]
        found = {t.name: Coding.of(t, index * SALTS + n) for n, t in enumerate(tensors)}
        codings = {name: coding for name, coding in found.items() if coding is not None}
        apart = [
            t for t in spec.owned
            if self._kernels and t.name in codings and codings[t.name].has_one_scale
        ]  # fmt: skip
        return LayerTensors(
            {t.name: (key_of(t), self._rows(t, codes=t in apart), t.shape) for t in spec.owned},
            {t.name: t.owner for t in spec.rows if t.owner is not None},
            {t.name: self._values(t) for t in spec.fixed},
            {t.name: self._inputs(t.inputs) for t in spec.fixed if self._is_replayed(t)},
            codings,
            {t.name: t.block for t in spec.owned if t.block is not None},
            {t.name: self._scales(t) for t in apart},
            {t.name: t.keeps for t in spec.fixed if t.keeps is not None},
        )

    def _rows(self, tensor: RowSpec, *, codes: bool) -> Tensor:
        *planes, width = tensor.shape if codes else held_shape(tensor)
        return self._zeros(tensor, (*planes, self._count(tensor), width))

    def _scales(self, tensor: RowSpec) -> Tensor:
        shape = (*tensor.shape[:-1], self._count(tensor), 1)
        return torch.zeros(shape, dtype=torch.float32, device=self._device)

    def _count(self, tensor: RowSpec) -> int:
        """Rows of a pool; one page more, for the rows of padding."""
        table = self._tables[key_of(tensor)]
        return (table.n_pages + 1) * table.page_size

    def _is_replayed(self, tensor: FixedSpec) -> bool:
        return self._rings is not None and tensor.inputs is not None

    def _values(self, tensor: FixedSpec) -> Tensor:
        table = self._rings if self._is_replayed(tensor) else self._slots
        assert table is not None
        return self._zeros(tensor, (table.count, *held_shape(tensor)))

    def _inputs(self, tensor: TensorSpec | None) -> Tensor:
        assert self._rings is not None and tensor is not None
        shape = (self._rings.count, self._rings.replay.rows, *held_shape(tensor))
        return self._zeros(tensor, shape)

    def _zeros(self, tensor: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        # Zeros, not empty: rows that a mask hides are still multiplied by a zero weight.
        return torch.zeros(shape, dtype=held_dtype(tensor), device=self._device)

    def _bytes_of_a_page(self, key: TableKey) -> int:
        pools = (found for layer in self.layers for found in layer.row_pools)
        total = sum(pool.nbytes for held_by, pool in pools if held_by == key)
        return total // (self._tables[key].n_pages + 1)


def decoded(layer: LayerTensors, name: str, held: Tensor) -> Tensor:
    """A copy of a value, or of rows with their scales, in the dtype that the mixer gives."""
    coding = layer.codings.get(name)
    return held.clone() if coding is None else coding.decode(held)


def decoded_rows(layer: LayerTensors, name: str, at: Tensor) -> Tensor:
    """A copy of the rows at int64 [N], [*planes, N, row], in the dtype that the mixer gives."""
    held = layer.rows[name][1][..., at, :]
    if name in layer.scales:
        held = torch.cat((held, layer.scales[name][..., at, :].view(torch.uint8)), -1)
    return decoded(layer, name, held)


def key_of(tensor: RowSpec) -> TableKey:
    """The block table behind a row tensor."""
    return TableKey(tensor.every, tensor.window, tensor.sinks)


def pool_bytes(
    specs: Sequence[StateSpec], pages: Mapping[TableKey, int], *, sequences: int, kept: int,
    max_context: int, page_size: int, lookback: int, replay: int,
) -> int:  # fmt: skip
    """What all pools will take, those of padding included.

    pages: of tables that do not hold all sequences at full length.
    """
    total = 0
    for tensor in (t for s in specs for t in s.owned):
        full = tensor.held_pages(max_context, page_size, lookback) * sequences
        total += (pages.get(key_of(tensor), full) + 1) * page_size * tensor.nbytes
    for value in (t for s in specs for t in s.fixed):
        total += value.held_bytes(max_context, lookback, replay) * sequences
        # Beside them the slots of zeros and of padding.
        total += (2 + kept) * value.held_bytes(1, 0, replay)
    return total
