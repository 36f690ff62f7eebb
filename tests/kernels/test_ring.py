"""Steps with a ring: held inputs are replayed on a state that is stored only when it takes some in.

Rows of a ring that nobody holds are NaN, and so is every padded input: reading either shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from inspect import signature

import pytest
import torch
from torch import Tensor

from kernels.recurrent.ring import Ring
from tests.kernels.interpreter import interpreted
from tests.kernels.rings import RINGED, Books, packed, ring_ref, row_width, turned
from tests.kernels.slots import in_place
from tests.kernels.step_inputs import BF16, F32, SLOTS, Args, B, int32
from tests.kernels.steps import Case, Wrong, case, close, put

#: Rows wrap around R in the first sequence, new ones in the second.
BOOKS = {
    "folds": Books(past=(34, 14, 7), held=(5, 0, 7), fold=(5, 0, 3)),
    "keeps": Books(past=(34, 20, 14), held=(6, 9, 4), fold=(0, 9, 1), rows=14),
}
HEADS: Args = {"g": 2, "h": 4}
NORMED: Args = {"norm": "heads"}


def options(name: str, *more: Args) -> Args:
    """Those of some sizes and options that a step has: not every one has groups or a norm apart."""
    known = signature(RINGED[name].arguments).parameters
    every = {key: value for args in more for key, value in args.items()}
    open_ended = "sizes" in known
    return {key: value for key, value in every.items() if open_ended or key in known}


CASES = {
    name: [
        case(1, p=20, **options(name, HEADS)),
        case(1, p=40, inputs=BF16, **options(name, HEADS, NORMED)),
        case(3, p=20, inputs=BF16, state=BF16, new=(0, 3, 2), **options(name, HEADS)),
        case(5, n=24, p=40, new=(5, 0, 1), **options(name, HEADS, NORMED)),
        case(2, p=20, state=BF16, **options(name, HEADS, NORMED)),
    ]
    for name in RINGED
}
CASES["gdn"].append(case(3, p=20, new=(0, 3, 2), beta_max=2.0, **HEADS))
CASES["ssm"].append(case(2, p=40, new=(2, 0, 1), norm=2, **HEADS))
CASES["linear"] += [
    case(3, p=40, new=(3, 0, 2), turn=True, norm="heads", **HEADS),
    case(1, p=20, inputs=BF16, turn=True, rounded=True, **HEADS),
]
EVERY = [pytest.param(name, c, id=f"{name}-{c}") for name in RINGED for c in CASES[name]]
every_step = pytest.mark.parametrize("name", RINGED)


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def bits(t: Tensor) -> Tensor:
    """Comparable where it is NaN."""
    return t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32)


def ring_pool(slots: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Every second slot of a wider one, all NaN."""
    return torch.full((slots, 2, rows, width), torch.nan, dtype=dtype)[:, 1]


def filled(name: str, history: Args, args: Args, books: Books, pool: Tensor) -> Tensor:
    """A ring with the first tokens of `history` as the held ones."""
    begins = {"past": int32(*books.past) - int32(*books.held)} if "past" in args else {}
    rows = packed(name, history | begins)
    ring = ring_pool(len(pool), books.rows, row_width(name, args, pool), rows.dtype)
    for b, slot in enumerate(SLOTS):
        for t in range(books.held[b]):
            ring[slot, (books.past[b] - books.held[b] + t) % books.rows] = rows[b, t]
    return ring


def pad(name: str, args: Args, counts: tuple[int, ...]) -> None:
    """What lies past the valid tokens becomes NaN."""
    gates = [args["norm"].gate] if args.get("norm") else []
    for b, count in enumerate(counts):
        for t in (*RINGED[name].rows(args).values(), *gates):
            t[b, count:] = torch.nan


@pytest.mark.parametrize("books", BOOKS.values(), ids=BOOKS)
@pytest.mark.parametrize(("name", "c"), EVERY)
def test_a_step_with_a_ring_equals_the_oracle(name: str, c: Case, books: Books) -> None:
    step, counts = RINGED[name], c.new or (c.k,) * B
    args, pool = step.made(c)
    args |= turned(args, books.past)
    plain = {key: size for key, size in c.sizes.items() if key != "norm"}
    history = args | step.made(replace(c, k=max(books.held), sizes=plain))[0]
    history |= {key: args[key] for key in (*step.fixed, "cos_sin", "past") if key in args}
    ring, before = filled(name, history, args, books, pool), pool.clone()
    rings = ring.clone()
    expected, after = ring_ref(step, history, args, books, before[list(SLOTS)])
    fresh = packed(name, args)
    pad(name, args, counts)
    arrivals = torch.zeros(32, dtype=torch.int32)
    at = {"read": int32(*SLOTS), "write": None, "ring": books.ring(ring)}
    at |= {"arrivals": arrivals} if step.norms else {}
    y = step.run(args, pool, at | {"new": int32(*c.new) if c.new else None})
    assert y.dtype == c.inputs and not arrivals.any()
    exact, kept = step.y_tolerance(c.inputs), step.state_tolerance(c.state)
    if c.rounded:
        exact = kept = step.torch_factor * exact
    for b, (slot, count) in enumerate(zip(SLOTS, counts, strict=True)):
        close(y[b, :count], expected[b, :count], exact)
        assert (y[b, count:] == 0).all()
        if fold := books.fold[b]:
            close(pool[slot], after[b][fold], kept)
            before[slot] = pool[slot]
        for t in range(count):
            row = ring[slot, (books.past[b] + t) % books.rows]
            if "past" in args:
                close(row, fresh[b, t], 1e-6)
            else:
                assert torch.equal(row, fresh[b, t])
            rings[slot, (books.past[b] + t) % books.rows] = row
    assert torch.equal(pool, before)
    # Nor was anything written between the slots.
    assert torch.equal(bits(ring), bits(rings)) and ring._base is not None
    assert ring._base[:, 0].isnan().all()


@pytest.mark.parametrize("inputs", [F32, BF16], ids=["float32", "bfloat16"])
@every_step
def test_steps_with_a_ring_equal_steps_without_bit_for_bit(name: str, inputs: torch.dtype) -> None:
    """Ten steps of two tokens of which some are padded and some taken back; folds now and then,
    of all held inputs or all but one.
    """
    step, rows, k = RINGED[name], 6, 2
    turn: Args = {"turn": True} if name == "linear" else {}
    c = case(k, p=36, inputs=inputs, **options(name, NORMED), **turn)
    args, plain = step.made(c)
    pool, slots = plain.clone(), list(SLOTS)
    fixed = {key: args[key] for key in step.fixed} | turned(args, (0,) * B)
    ring = ring_pool(len(pool), rows, row_width(name, args, pool), inputs)
    past, held, folds = [0] * B, [0] * B, 0
    states = [[state] for state in plain[slots].clone()]
    chance = torch.Generator().manual_seed(0)
    for _ in range(10):
        args = step.arguments(k, inputs, **c.sizes)[0] | fixed
        args |= {"past": int32(*past)} if turn else {}
        counts = torch.randint(k + 1, (B,), generator=chance).tolist()
        fold = [h - (b == 1) if h + 2 * k > rows else 0 for b, h in enumerate(held)]
        folds += sum(f > 0 for f in fold)
        pad(name, args, tuple(counts))
        new, books = {"new": int32(*counts)}, Books(past=past, held=held, fold=fold, rows=rows)
        plain[slots] = torch.stack([found[-1] for found in states])
        at = in_place(SLOTS, k, counts, len(plain) - B * k)
        expected = step.run(args, plain, at | new)
        at = {"read": int32(*SLOTS), "write": None, "ring": books.ring(ring)}
        assert torch.equal(step.run(args, pool, at | new), expected)
        after = in_place(SLOTS, k, counts, len(plain) - B * k)["write"]
        for b, slot in enumerate(SLOTS):
            held[b] -= fold[b]
            assert torch.equal(pool[slot], states[b][past[b] - held[b]])
            taken = max(counts[b] - int(torch.randint(2, (), generator=chance)), 0)
            states[b] += [plain[after[b, t]].clone() for t in range(taken)]
            past[b] += taken
            held[b] += taken
    assert folds > 4 and max(past) > rows


@every_step
def test_a_step_without_tokens_brings_states_up_to_date(name: str) -> None:
    step, books = RINGED[name], Books(past=(20, 3, 9), held=(4, 3, 0), fold=(4, 3, 0))
    args, pool = step.made(case(1, p=40, **options(name, HEADS, NORMED)))
    history = args | step.made(case(4, p=40, **options(name, HEADS)))[0]
    history |= {key: args[key] for key in step.fixed}
    ring, before = filled(name, history, args, books, pool), pool.clone()
    rings = ring.clone()
    _, after = ring_ref(step, history, args, books, before[list(SLOTS)])
    pad(name, args, (0,) * B)
    at = {"read": int32(*SLOTS), "write": None, "ring": books.ring(ring), "new": int32(0, 0, 0)}
    assert not step.run(args, pool, at).any()
    for b, slot in enumerate(SLOTS):
        close(pool[slot], after[b][books.held[b]], step.state_tolerance())
    assert torch.equal(pool[SLOTS[2]], before[SLOTS[2]])
    assert torch.equal(bits(ring), bits(rings))


def _ring(**changes: Callable[[Tensor], Tensor]) -> Callable[[Args], Args]:
    def spoil(args: Args) -> Args:
        ring: Ring = args["ring"]
        return {
            "ring": ring._replace(
                **{key: change(getattr(ring, key)) for key, change in changes.items()}
            )
        }

    return spoil


WRONG: Wrong = {
    "write": (lambda _: {"write": in_place(SLOTS, 2)["write"]}, "^write=int32.*with a ring"),
    "each": (lambda _: {"each": True}, "^each=True is given with a ring"),
    "neither": (lambda _: {"ring": None}, "^write is None; without a ring"),
    "pool dtype": (_ring(pool=Tensor.half), "=float32.*must have the ring's dtype"),
    "pool dims": (_ring(pool=lambda t: t[0]), r"^ring.pool=.*must be \[12, R >= 2, "),
    "pool slots": (_ring(pool=lambda t: t[1:]), "^ring.pool=.*must be "),
    "pool rows": (_ring(pool=lambda t: t[:, :1]), "^ring.pool=.*must be "),
    "pool width": (_ring(pool=lambda t: t[..., 1:]), "^ring.pool=.*must be "),
    "pool strides": (_ring(pool=lambda t: t.mT.contiguous().mT), "^ring.pool=.*contiguous slots"),
    "pool overlap": (_ring(pool=lambda t: t[:1].expand(t.shape)), "^ring.pool=.*contiguous slots"),
    "pool device": (_ring(pool=lambda t: t.to("meta")), "^ring.pool=.*on meta must have"),
    **{
        f"{book} {what}": (_ring(**{book: change}), rf"^ring.{book} {message}")
        for book in ("past", "held", "fold")
        for what, change, message in (
            ("shape", lambda t: t[1:], "has shape"),
            ("dtype", Tensor.long, "is torch.int64"),
            ("strides", lambda t: torch.stack((t, t), -1)[:, 0], "is .*strides"),
            ("device", lambda t: t.to("meta"), "is .*on meta"),
        )
    },
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
@every_step
def test_a_ring_that_does_not_fit_is_refused(
    name: str, spoil: Callable[[Args], Args], message: str
) -> None:
    args, books = RINGED[name].fitting(), BOOKS["folds"]
    pool = ring_pool(len(args["state"]), 16, row_width(name, args, args["state"]), F32)
    args |= {"write": None, "each": False, "ring": books.ring(pool)}
    RINGED[name].refuses(args | spoil(args), message)


@every_step
def test_inputs_of_another_dtype_than_the_ring_are_refused(name: str) -> None:
    args, books = RINGED[name].fitting(), BOOKS["folds"]
    pool = ring_pool(len(args["state"]), 16, row_width(name, args, args["state"]), F32)
    args |= {"write": None, "each": False, "ring": books.ring(pool)}
    other = {"ssm": "dt", "linear": "v", "wkv": "rate"}.get(name, "a")
    RINGED[name].refuses(args | put(other, Tensor.half)(args), f"^{other}=float16.*ring's dtype")
