"""States in few bits in a store: the laws, exact where rounding allows it, else within a bound."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.backends import NoFormError
from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from archs.state_formats import StateFormat
from archs.storage import keep, state_kinds
from infer.engine import Engine
from infer.store import StateStore

NAMES = (*REGISTRY, *HYBRIDS)
TOKENS = 90
PIECES = (7, 1, 1, 33, 1, 5, 1, 41)
ROWS = ("int8", "fp8", "int4-g32", "int3", "bfloat16", "float16-sr")
VALUES = ("int8", "int8-ef", "int8-sr", "fp8", "int4", "bfloat16", "float16-sr")


@cache
def built(arch: str) -> Model:
    spec = ModelSpec(arch=arch, scale=get_scale("tiny"))
    return spec.build(dtype=torch.float64).eval()


def kept(arch: str, name: str) -> Model:
    """The model with its state in the format. The tests share it: each says what it wants."""
    model = keep(built(arch), StateFormat.named(name))
    assert model.state_format
    return model


REMEMBERED = {
    name: state_kinds(ModelSpec(arch=name, scale=get_scale("tiny")).outline()) for name in NAMES
}


def having(*kinds: str) -> list[str]:
    """Architectures that remember something of these kinds."""
    return [name for name in NAMES if REMEMBERED[name].intersection(kinds)]


#: Recurrences amplify what sums in another order change, up to where a number gets another code.
ROWS_ALONE = [name for name in having("kv") if name not in having("memory")]


def ids(batch: int = 2, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 500, (batch, TOKENS), generator=draw)


def engine_of(model: Model, **options: int) -> Engine:
    wanted = {"max_sequences": 4, "max_context": TOKENS + 30, "page_size": 8, **options}
    return Engine(model, backend="torch", **wanted)  # type: ignore[arg-type]


def read(engine: Engine, tokens: Tensor, pieces: Sequence[int]) -> Tensor:
    slots = [engine.store.add() for _ in tokens]
    parts = tokens.split(list(pieces), 1)
    found = torch.cat([engine.extend(slots, part) for part in parts], 1)
    end = sum(pieces)
    assert engine.store.allocated_bytes == len(tokens) * engine.store.declared_bytes(end)
    for slot in slots:
        engine.store.release(slot)
    return found


#: What sums in another order may do to rows: a scale is rounded to float32, up or down.
ALIKE = 1e-5


@torch.no_grad()
def away(found: Tensor, wanted: Tensor) -> float:
    """The worst position's relative distance."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def raw(store: StateStore, sequence: int) -> list[Tensor]:
    """All that is stored of a sequence, as bytes lie in the pools."""
    found = []
    for layer in store.pools.layers:
        for name, value in layer.fixed.items():
            table = store.rings if name in layer.inputs else store.slots
            assert table is not None
            found.append(value[table.current(sequence)].clone())
        for key, pool, _ in layer.rows.values():
            table_ = store.tables[key]
            rows = table_.rows(store.lengths[sequence])
            first = max(0, rows - (key.window or rows))
            at = torch.tensor(table_.places(sequence, range(first, rows)), dtype=torch.int64)
            found.append(pool[..., at, :].clone())
    return found


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("arch", ROWS_ALONE)
def test_rows_are_seen_as_they_are_stored_however_tokens_are_split(arch: str, name: str) -> None:
    model = kept(arch, f"kv:{name}")
    whole = read(engine_of(model), ids(), (TOKENS,))
    assert away(read(engine_of(model), ids(), PIECES), whole) < ALIKE
    exact = model.hidden_states(ids())
    assert away(whole, model.logits(exact)) > 10 * ALIKE


@pytest.mark.parametrize("name", ["int4-kivi", "int2-kivi"])
@pytest.mark.parametrize("arch", ["mha", "gqa", "mqa", "cla"])
def test_blocks_are_seen_alike_however_tokens_are_split(arch: str, name: str) -> None:
    model = kept(arch, f"kv:{name}")
    whole = read(engine_of(model), ids(), (TOKENS,))
    assert away(read(engine_of(model), ids(), PIECES), whole) < ALIKE
    # Until a block is full, nothing is rounded; then what lies in it is.
    exact = model.logits(model.hidden_states(ids()))
    assert away(whole[:, :31], exact[:, :31]) < 1e-9 < away(whole[:, 40:], exact[:, 40:])


#: How far logits may be from those of an exact state, on average over positions, in steps of any
#: length. Models are random, and their head norms lift small outputs and rounding with them.
BOUNDS = {
    "int8": 0.12, "int8-ef": 0.06, "int8-sr": 0.16, "fp8": 0.4, "int4": 1.0, "bfloat16": 0.03,
    "float16-sr": 0.006,
}  # fmt: skip


@cache
def exact_logits(arch: str) -> Tensor:
    return keep(built(arch), StateFormat()).forward(ids()).detach()


@cache
def drift(arch: str, name: str, single: bool = True) -> float:
    """The mean distance to an exact state's logits, in single steps or in pieces."""
    pieces = [1] * TOKENS if single else PIECES
    found, exact = read(engine_of(kept(arch, name)), ids(), pieces), exact_logits(arch)
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("arch", having("memory"))
def test_values_are_within_a_bound_however_tokens_are_split(arch: str, name: str) -> None:
    single = drift(arch, f"memory:{name}")
    assert 0 < drift(arch, f"memory:{name}", single=False) < single < BOUNDS[name]


@pytest.mark.parametrize("arch", having("conv"))
def test_tails_of_convolutions_are_rounded_once_and_do_not_drift(arch: str) -> None:
    """A row moves through a tail as it was stored, whoever stores it again."""
    assert 0 < drift(arch, "conv:int8") < 0.2
    assert drift(arch, "conv:int8") > 3 * drift(arch, "conv:bfloat16") > 0


def test_fewer_bits_and_fewer_roundings_are_seen() -> None:
    """Feedback is nearer than rounding to nearest, and that than rounding at random."""
    for arch in ("gdn", "mamba2", "linear"):
        found = {name: drift(arch, f"memory:{name}") for name in VALUES}
        assert found["int4"] > 5 * found["int8"]
        assert found["int8-sr"] > 1.2 * found["int8"] > 1.5 * found["int8-ef"]
        assert found["bfloat16"] > 4 * found["float16-sr"]


def test_a_delta_rule_stands_rounding_less_than_a_decaying_state() -> None:
    assert drift("gdn", "memory:int8") > 5 * drift("mamba2", "memory:int8")


FORMAT = "kv:int8,memory:int8-sr,conv:int8"


@pytest.mark.parametrize("arch", NAMES)
def test_a_request_does_not_depend_on_its_company(arch: str) -> None:
    """Two companies of one shape: sums of other shapes differ in their last bit, which may round
    a number to another code.
    """
    model, tokens = kept(arch, FORMAT), ids(5)
    found, states = [], []
    for others in (tokens[1:3], tokens[3:]):
        engine = engine_of(model)
        slots = [engine.store.add() for _ in range(3)]
        logits = []
        for at in range(0, TOKENS, 9):
            rows = torch.stack((others[0, :9], tokens[0, at : at + 9], others[1, :9]))
            new = torch.tensor([2, 9, 0]) if at % 2 else None
            logits.append(engine.extend(slots, rows, new)[1])
        found.append(torch.cat(logits))
        states.append(raw(engine.store, slots[1]))
    assert torch.equal(*found) and same(*states)


@pytest.mark.parametrize("replay", [0, 16])
@pytest.mark.parametrize("arch", NAMES)
def test_forks_and_rollbacks_give_what_was_stored_bit_for_bit(arch: str, replay: int) -> None:
    model, tokens = kept(arch, "kv:int4,memory:int8-ef,conv:int8"), ids(1)
    engine = engine_of(model, lookback=4, replay=replay)
    store = engine.store
    slot = store.add()
    engine.extend([slot], tokens[:, :20])
    states = []
    for at in range(20, 30):
        engine.extend([slot], tokens[:, at : at + 1])
        states.append(raw(store, slot))
    store.rollback(slot, 3)
    if not replay:
        # Of values that are replayed nothing is taken back but inputs.
        assert same(raw(store, slot), states[-4])
    child = store.fork(slot)
    engine.extend([child], tokens[:, 40:45])
    if not replay:
        assert same(raw(store, slot), states[-4])
    again = engine.extend([slot], tokens[:, 27:30])
    fresh = engine_of(model, lookback=4, replay=replay)
    other = fresh.store.add()
    fresh.extend([other], tokens[:, :20])
    for at in range(20, 27):
        fresh.extend([other], tokens[:, at : at + 1])
    assert away(again, fresh.extend([other], tokens[:, 27:30])) < 1e-9
    store.release(child)
    store.release(slot)
    assert store.allocated_bytes == 0


def test_blocks_are_forked_and_taken_back() -> None:
    """Tokens that wait for their block come back, also from a block that was full."""
    model, tokens = kept("gqa", "kv:int4-kivi"), ids(1)
    engine = engine_of(model, lookback=4)
    slot = engine.store.add()
    engine.extend([slot], tokens[:, :30])
    before = raw(engine.store, slot)
    engine.extend([slot], tokens[:, 50:54])
    engine.store.rollback(slot, 4)
    assert same(raw(engine.store, slot), before)
    child = engine.store.fork(slot)
    parts = tokens[:, 30:34], tokens[:, 34:40]
    found = torch.cat([engine.extend([slot], part) for part in parts], 1)
    plain = engine_of(model)
    other = plain.store.add()
    assert away(found, plain.extend([other], tokens[:, :40])[:, 30:]) < 1e-9
    assert same(raw(engine.store, child), before)


def test_a_ring_rounds_its_value_when_it_folds_and_not_before() -> None:
    model, tokens = kept("gdn", "memory:int8"), ids(1)
    engine = engine_of(model, replay=16)
    slot = engine.store.add()
    engine.extend([slot], tokens[:, :20])
    values = []
    for at in range(20, 60):
        engine.extend([slot], tokens[:, at : at + 1])
        values.append(raw(engine.store, slot)[1])
    changes = sum(not torch.equal(a, b) for a, b in pairwise(values))
    assert 2 <= changes <= 4
    ring, exact = read(engine_of(model, replay=16), ids(), [1] * TOKENS), exact_logits("gdn")
    found = ((ring - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()
    assert found < 0.7 * drift("gdn", "memory:int8")


def test_a_snapshot_is_in_what_the_mixer_computes() -> None:
    model, tokens = kept("gdn:gqa=3:1", "kv:int8,memory:int8"), ids(1)
    stores = []
    for name in ("kv:int8,memory:int8", ""):
        engine = engine_of(keep(model, StateFormat.named(name)))
        slot = engine.store.add()
        engine.extend([slot], tokens)
        stores.append(engine.store.snapshot(slot))
    for rounded, exact in zip(*stores, strict=True):
        for name, value in rounded.items():
            assert value.dtype == exact[name].dtype and value.shape == exact[name].shape
            # Later layers see what earlier ones have rounded.
            assert away(value.flatten()[None], exact[name].flatten()[None]) < 0.15


def test_synthetic_states_are_numbers_like_others() -> None:
    engine = engine_of(kept("gdn:gqa=3:1", "kv:int8,memory:int8-ef"))
    slot = engine.store.add()
    engine.store.fill([slot], 40)
    held = engine.store.snapshot(slot)
    values = torch.cat([v.flatten() for layer in held for n, v in layer.items() if n != "conv"])
    assert (values - 0.01).abs().max() < 1e-4


def test_kernels_and_codes_are_refused_in_one_line() -> None:
    with pytest.raises(NoFormError, match="no kernel of backend triton reads 'memory' of Gated"):
        Engine(kept("gdn", "memory:int8"), backend="triton")
    with pytest.raises(UserError, match="or backend=torch"):
        Engine(kept("gqa", "kv:fp8"), backend="flash-attn")
