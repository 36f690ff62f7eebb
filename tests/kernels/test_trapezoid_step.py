"""The fused step of the trapezoidal recurrence: oracle, torch form, raggedness, slots, refusals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.trapezoid import step as op
from kernels.trapezoid.torch import TrapezoidSizes, TrapezoidWeights, rows_of, tokens_of
from tests.kernels.interpreter import interpreted
from tests.kernels.slots import in_place
from tests.kernels.trapezoids import Held, held_of, inputs_of, sizes_of, weights_of

SLOTS = [4, 1, 3]
B, POOL = len(SLOTS), 6
F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 2e-5, BF16: 2e-2}


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


@dataclass(frozen=True, kw_only=True)
class Case:
    k: int
    sizes: TrapezoidSizes
    inputs: torch.dtype = F32
    state: torch.dtype = F32
    new: tuple[int, ...] | None = None


CASES = [
    pytest.param(Case(k=1, sizes=sizes_of(p=32)), id="one"),
    pytest.param(Case(k=1, sizes=sizes_of(n=24, p=17, rank=4)), id="one-rank-4"),
    pytest.param(Case(k=1, sizes=sizes_of(angles=0)), id="one-none-turns"),
    pytest.param(Case(k=2, sizes=sizes_of(groups=2, angles=4), inputs=BF16), id="two-narrow"),
    pytest.param(Case(k=4, sizes=sizes_of(n=7, angles=3), new=(4, 0, 3)), id="ragged-odd"),
    pytest.param(
        Case(k=3, sizes=sizes_of(rank=2, groups=2), inputs=BF16, state=BF16, new=(0, 1, 3)),
        id="ragged-narrow-rank-2",
    ),
    pytest.param(Case(k=9, sizes=sizes_of(heads=1, p=12), new=(9, 5, 1)), id="nine"),
]


def run(
    c: Case, inputs: Tensor, weights: TrapezoidWeights, held: Held, at: dict[str, Any]
) -> Tensor:
    return op.trapezoid_step(inputs, c.sizes, weights, *held, **at)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Norms of differences: single numbers of bfloat16 may be near zero."""
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < TOLERANCE[dtype]


def last_of(
    c: Case, inputs: Tensor, weights: TrapezoidWeights, before: Held
) -> tuple[Tensor, Tensor]:
    """Rows [B, K, last] and angles [B, K, H, A] after each token, by torch's form."""
    s, tokens = c.sizes, tokens_of(inputs, c.sizes, weights, before.angle)
    return rows_of(tokens.k, inputs[..., s.inner : 2 * s.inner], s), tokens.angles


@pytest.mark.parametrize("each", [False, True], ids=["last", "each"])
@pytest.mark.parametrize("c", CASES)
def test_equals_the_oracle_in_all_that_is_kept(c: Case, each: bool) -> None:
    s, counts = c.sizes, c.new or (c.k,) * B
    inputs, weights = inputs_of(s, B, c.k, c.inputs), weights_of(s, c.inputs)
    held = held_of(s, POOL + B * c.k, c.inputs, c.state)
    before = held.at(list(range(POOL + B * c.k)))
    at = in_place(SLOTS, c.k, c.new, POOL if each else None)
    at["new"] = None if c.new is None else torch.tensor(c.new, dtype=torch.int32)
    expected, states = op.trapezoid_step_ref(inputs, s, weights, *before.at(SLOTS))
    rows, angles = last_of(c, inputs, weights, before.at(SLOTS))
    for row, count in enumerate(counts):
        inputs[row, count:] = torch.nan
    y = run(c, inputs, weights, held, at)
    assert y.dtype == c.inputs and y.shape == (B, c.k, s.inner)
    written = set()
    for row, (slot, count) in enumerate(zip(SLOTS, counts, strict=True)):
        assert (y[row, count:] == 0).all()
        if not count:
            continue
        close(y[row, :count], expected[row, :count], c.inputs)
        for t in range(count) if each else [count - 1]:
            to = slot if t == count - 1 else int(at["write"][row, t])
            close(held.state[to], states[row, t], max(c.inputs, c.state, key=TOLERANCE.__getitem__))
            close(held.last[to, 0], rows[row, t], c.inputs)
            if held.angle is not None:
                away = (held.angle[to] - angles[row, t]).abs()
                assert float(torch.minimum(away, 1 - away).max()) < 1e-5
            written.add(to)
    others = [slot for slot in range(len(held.state)) if slot not in written]
    for pool, was in zip(held, before, strict=True):
        assert pool is None or torch.equal(pool[others], was[others])


def test_many_tokens_equal_one_at_a_time() -> None:
    c = Case(k=5, sizes=sizes_of(rank=2))
    inputs, weights, held = inputs_of(c.sizes, B, 5), weights_of(c.sizes), held_of(c.sizes, POOL)
    single = held.at(list(range(POOL)))
    pieces = [run(c, inputs[:, t : t + 1], weights, single, in_place(SLOTS, 1)) for t in range(5)]
    y = run(c, inputs, weights, held, in_place(SLOTS, 5))
    torch.testing.assert_close(y, torch.cat(pieces, 1), rtol=1e-6, atol=1e-6)
    for pool, other in zip(held, single, strict=True):
        torch.testing.assert_close(pool, other, rtol=1e-6, atol=1e-6)


def test_inputs_may_be_columns_and_slots_may_lie_apart() -> None:
    c = Case(k=2, sizes=sizes_of())
    inputs, weights, held = inputs_of(c.sizes, B, 2), weights_of(c.sizes), held_of(c.sizes, POOL)
    apart = Held(*(torch.stack((t, t), 1)[:, 1] for t in held if t is not None))
    wide = torch.cat((inputs, inputs), -1)[..., : inputs.shape[-1]]
    y = run(c, inputs, weights, held, in_place(SLOTS, 2))
    assert torch.equal(run(c, wide, weights, apart, in_place(SLOTS, 2)), y)
    for pool, other in zip(held, apart, strict=True):
        assert pool is not None and torch.equal(pool, other)


@pytest.mark.parametrize("each", [False, True], ids=["last", "each"])
def test_states_go_to_the_slots_that_write_names_and_nowhere_else(each: bool) -> None:
    c = Case(k=3, sizes=sizes_of())
    inputs, weights, held = inputs_of(c.sizes, B, 3), weights_of(c.sizes), held_of(c.sizes, 10)
    before = held.at(list(range(10)))
    write = torch.tensor([[-1, 7, 8], [-1, -1, -1], [9, -1, SLOTS[2]]], dtype=torch.int32)
    at = {"read": torch.tensor(SLOTS, dtype=torch.int32), "write": write, "each": each}
    _, states = op.trapezoid_step_ref(inputs, c.sizes, weights, *before.at(SLOTS))
    run(c, inputs, weights, held, at)
    kept = (write >= 0) & torch.tensor([each, each, True])
    for row, t in kept.nonzero().tolist():
        close(held.state[write[row, t]], states[row, t], F32)
    others = [slot for slot in range(10) if slot not in write[kept]]
    for pool, was in zip(held, before, strict=True):
        assert pool is not None and was is not None
        assert torch.equal(pool[others], was[others])


Args = dict[str, Any]


def replaced(name: str, change: Callable[[Any], Any]) -> Callable[[Args], Args]:
    return lambda args: {name: change(args[name])}


def weight(name: str, change: Callable[[Any], Any]) -> Callable[[Args], Args]:
    return lambda args: {
        "weights": args["weights"]._replace(**{name: change(getattr(args["weights"], name))})
    }


def spread(t: Tensor) -> Tensor:
    return torch.stack((t, t), -1)[..., 0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replaced("inputs", lambda t: t[0]), "^inputs has shape .* 3 dimensions"),
        (replaced("inputs", lambda t: t[..., 1:]), "^inputs has shape"),
        (replaced("inputs", Tensor.double), "^inputs has dtype torch.float64"),
        (replaced("inputs", spread), "^inputs has strides"),
        (replaced("inputs", lambda t: torch.cat((t, t), 1)[:, :2]), "^inputs has strides .*evenly"),
        (replaced("sizes", lambda _: sizes_of(n=512, angles=0)), "^inputs has shape"),
        (replaced("last", lambda t: t[..., 1:]), "^last has shape"),
        (replaced("last", Tensor.double), "^last has dtype torch.float64"),
        (replaced("last", lambda t: t.to("meta")), "^last is on meta"),
        (replaced("angle", lambda _: None), "^angle=None needs a tensor for 2 angles"),
        (replaced("angle", lambda t: t[:, 1:]), "^angle has shape"),
        (replaced("angle", Tensor.bfloat16), "^angle=.*must be float32"),
        (replaced("angle", lambda t: t.mT.contiguous().mT), "^angle=.*each slot contiguous"),
        (replaced("state", lambda t: t[..., 1:]), "^state has shape"),
        (replaced("state", Tensor.half), "^state has dtype torch.float16"),
        (replaced("read", Tensor.long), "^read is torch.int64"),
        (replaced("write", lambda t: t[:, 1:]), "^write has shape"),
        (weight("b_bias", lambda t: t[:, 1:]), "^b_bias has shape"),
        (weight("d", Tensor.double), "^d has dtype torch.float64"),
        (weight("c_bias", lambda t: t.mT.contiguous().mT), "^c_bias has strides"),
        (weight("mimo_o", lambda _: None), "^mimo_o=None needs a tensor"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_launch(
    spoil: Callable[[Args], Args], message: str
) -> None:
    s = sizes_of(rank=2)
    held = held_of(s, POOL)
    args: Args = {
        "inputs": inputs_of(s, B, 2), "sizes": s, "weights": weights_of(s), **held._asdict(),
        **in_place(SLOTS, 2),
    }  # fmt: skip
    before = held.state.clone()
    with pytest.raises(ValueError, match=message):
        op.trapezoid_step(**args | spoil(args))
    assert torch.equal(held.state, before)
    op.trapezoid_step(**args)


def test_columns_vectors_need_several_columns() -> None:
    s = sizes_of()
    many = weights_of(sizes_of(rank=2))
    weights = weights_of(s)._replace(mimo_x=many.mimo_x)
    with pytest.raises(ValueError, match=r"^mimo_x=.*needs a rank above 1"):
        op.trapezoid_step(inputs_of(s, B, 1), s, weights, *held_of(s, POOL), **in_place(SLOTS, 1))


@pytest.mark.parametrize(
    ("n", "p", "message"),
    [
        (512, 33, r"^N=512, P=33 take a tile of 512x64; at most 16384"),
        (1, 6, "^N=1 must be at least 2"),
    ],
)
def test_sizes_that_a_tile_does_not_hold_are_refused(n: int, p: int, message: str) -> None:
    s = sizes_of(n=n, p=p, angles=0)
    with pytest.raises(ValueError, match=message):
        op.trapezoid_step(
            inputs_of(s, B, 1), s, weights_of(s), *held_of(s, POOL), **in_place(SLOTS, 1)
        )
