"""A store writes what was declared: no cast, no broadcast, on the host's side and the device's."""

import pytest
import torch
from torch import Tensor

from archs.errors import UserError
from archs.formats import Format
from archs.spec import FixedSpec, RowSpec, StateSpec
from archs.state import LayerState
from infer.store import StateStore
from tests.kernels.interpreter import interpreted


def spec_of(rows: torch.dtype, fixed: torch.dtype) -> StateSpec:
    kv = RowSpec(name="kv", shape=(2, 3), format=Format.of(rows), window=5)
    cell = FixedSpec(name="cell", shape=(4,), format=Format.of(fixed))
    return StateSpec(rows=(kv,), fixed=(cell,))


def layer_of(store: StateStore, tokens: int) -> LayerState:
    return store.begin([store.add(), store.add()], tokens).layers[0]


def store_of(spec: StateSpec, lookback: int = 0, backend: str = "torch") -> StateStore:
    return StateStore(
        [spec], max_sequences=2, max_context=64, page_size=16, lookback=lookback,
        kernels=backend != "torch",
    )  # fmt: skip


BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize(
    ("declared", "given"),
    [(torch.int8, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
     (torch.float8_e4m3fn, torch.float16)],
    ids=str,
)  # fmt: skip
def test_rows_of_another_type_are_refused(
    declared: torch.dtype, given: torch.dtype, tokens: int, backend: str
) -> None:
    store = store_of(spec_of(declared, torch.float32), backend=backend)
    with interpreted():
        layer = layer_of(store, tokens)
        rows = torch.full((2, tokens, 2, 3), 200.0).to(given)
        with pytest.raises(
            UserError, match=rf"layer 0 gives 'kv' in {given} .*declares {declared}"
        ):
            layer.append("kv", rows)
    assert not store.pools.layers[0].rows["kv"][1].float().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lookback", [0, 3])
def test_fixed_tensors_of_another_type_are_refused(lookback: int, backend: str) -> None:
    store = store_of(spec_of(torch.float32, torch.int8), lookback, backend)
    layer = layer_of(store, 2)
    good = torch.ones(2, 4, dtype=torch.int8)
    with pytest.raises(UserError, match=r"gives 'cell' in torch\.float32"):
        layer.put("cell", torch.full((2, 4), 200.0))
    if lookback:
        with pytest.raises(UserError, match=r"gives 'cell' in torch\.float32"):
            layer.put("cell", good, torch.full((2, 2, 4), 200.0))
    layer.put("cell", good, good[:, None].expand(-1, 2, -1) if lookback else None)
    assert store.slots is not None
    now = [store.slots.current(sequence) for sequence in (0, 1)]
    assert store.pools.layers[0].fixed["cell"][now].tolist() == good.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "given"),
    [("kv", torch.ones(2, 2, 1, 3)), ("kv", torch.ones(1, 2, 2, 3)), ("kv", torch.ones(2, 1, 2, 3)),
     ("cell", torch.ones(1, 4)), ("cell", torch.ones(2, 1))],
    ids=lambda v: v if isinstance(v, str) else str(list(v.shape)),
)  # fmt: skip
def test_what_would_have_to_be_broadcast_is_refused(name: str, given: Tensor, backend: str) -> None:
    layer = layer_of(store_of(spec_of(torch.float32, torch.float32), backend=backend), 2)
    with pytest.raises(UserError, match=rf"gives '{name}' of shape"):
        layer.append(name, given) if name == "kv" else layer.put(name, given)


def test_a_kernel_asks_for_pages_in_the_type_that_it_writes() -> None:
    store = store_of(spec_of(torch.bfloat16, torch.float32), backend="triton")
    layer = store.begin([store.add()], 1).layers[0]
    with pytest.raises(UserError, match=r"gives 'kv' in torch\.float32"):
        layer.pages("kv", torch.float32)
