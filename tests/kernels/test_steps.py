"""The laws of every recurrent step kernel: oracle, torch form, raggedness, slots, norm, refusals.

`torch.empty` is NaN here and so is every padded input: reading or leaving either shows.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.norm import rows as norm_triton
from tests.kernels.interpreter import interpreted
from tests.kernels.output_norms import WRONG_ARRIVALS, WRONG_NORMS, backwards, normed
from tests.kernels.slots import in_place
from tests.kernels.step_inputs import BF16, F32, POOL, SLOTS, Args, B, Norm, int32
from tests.kernels.steps import STEPS, Case, Step, Wrong, case, close, put

CASES = [
    pytest.param(step, c, id=f"{name}-{c}") for name, step in STEPS.items() for c in step.cases
]
NORMED = [
    pytest.param(step, norm, id=f"{name}-norm_{norm}")
    for name, step in STEPS.items()
    for norm in step.norms
]
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


@pytest.mark.parametrize("each", [False, True], ids=["last", "each"])
@pytest.mark.parametrize(("step", "c"), CASES)
def test_equals_the_oracle_and_the_torch_form(
    step: Step, c: Case, each: bool, interpreter: None
) -> None:
    args, pool = step.made(c)
    before, counts = pool.clone(), c.new or (c.k,) * B
    at = in_place(SLOTS, c.k, c.new, POOL if each else None)
    at["new"] = None if c.new is None else int32(*c.new)
    expected, states = step.oracle(args, before[list(SLOTS)])
    torch_y, torch_states = step.torch_form(args, before[list(SLOTS)].float())
    gates = [args["norm"].gate] if args.get("norm") else []
    for row, count in enumerate(counts):
        for t in (*step.rows(args).values(), *gates):
            t[row, count:] = torch.nan
    arrivals = torch.zeros(32, dtype=torch.int32)
    y = step.run(args, pool, at | ({"arrivals": arrivals} if step.norms else {}))
    assert y.dtype == c.inputs and pool.dtype == c.state and not arrivals.any()
    exact, kept = step.y_tolerance(c.inputs), step.state_tolerance(c.state)
    against_torch = step.torch_factor * exact
    if c.rounded:
        exact = kept = against_torch
    kept_by_torch = 0 if step.bitwise else max(kept, against_torch)
    for row, (slot, count) in enumerate(zip(SLOTS, counts, strict=True)):
        close(y[row, :count], expected[row, :count], exact)
        close(y[row, :count], torch_y[row, :count], against_torch)
        assert (y[row, count:] == 0).all()
        if count:
            close(pool[slot], states[row, count - 1], kept)
            close(pool[slot], torch_states[row, count - 1], kept_by_torch)
        else:
            assert torch.equal(pool[slot], before[slot])
        if each:
            close(pool[at["write"][row, :count]], states[row, :count], kept)
    valid = torch.arange(c.k) < torch.tensor(counts)[:, None]
    same_but_for(at["write"][valid], pool, before)


def same_but_for(slots: Tensor, pool: Tensor, before: Tensor) -> None:
    others = [slot for slot in range(len(pool)) if slot not in slots]
    assert torch.equal(pool[others], before[others])


@every_step
def test_many_tokens_equal_one_at_a_time(step: Step, interpreter: None) -> None:
    args, pool = step.made(case(5))
    single, outputs = pool.clone(), []
    for t in range(5):
        token = {name: x[:, t : t + 1] for name, x in step.rows(args).items()}
        outputs.append(step.run(args | token, single, in_place(SLOTS, 1)))
    y = step.run(args, pool, in_place(SLOTS, 5))
    tolerance = 0 if step.bitwise else 1e-6
    close(y, torch.cat(outputs, 1), tolerance)
    close(pool, single, tolerance)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("step", "norm"), NORMED)
def test_a_norm_within_equals_one_in_a_launch_of_its_own(
    step: Step, norm: Norm, dtype: torch.dtype, interpreter: None
) -> None:
    """Twice with the same counters, once from the grid's end: whoever comes last norms."""
    h, at = 4, in_place(SLOTS, 3)
    args, pool = step.made(case(3, p=48, h=h, inputs=dtype, norm=norm))
    arrivals = torch.zeros(B * (norm if isinstance(norm, int) else h), dtype=torch.int32)
    plain = pool.clone()
    y = step.run(args | {"norm": None}, plain, at)
    expected = normed(y, args["norm"], norm_triton.gated_rms_norm)
    for order in (nullcontext(), backwards()):
        within = pool.clone()
        with order:
            y = step.run(args, within, at | {"arrivals": arrivals})
        close(y, expected, step.y_tolerance(dtype) / 10)
        assert torch.equal(within, plain) and not arrivals.any()


@every_step
def test_slots_may_lie_apart(step: Step, interpreter: None) -> None:
    args, pool = step.made(case(1))
    wide = torch.stack((torch.randn_like(pool), pool), 1)
    _, states = step.oracle(args, pool[list(SLOTS)])
    before = wide.clone()
    step.run(args, wide[:, 1], in_place(SLOTS, 1))
    close(wide[list(SLOTS), 1], states[:, -1], step.state_tolerance())
    assert torch.equal(wide[:, 0], before[:, 0])


@pytest.mark.parametrize("each", [False, True], ids=["last", "each"])
@every_step
def test_states_go_to_the_slots_that_write_names_and_nowhere_else(
    step: Step, each: bool, interpreter: None
) -> None:
    args, pool = step.made(case(3))
    write = torch.stack((int32(-1, 7, 8), int32(-1, -1, -1), int32(9, -1, SLOTS[2])))
    before = pool.clone()
    _, states = step.oracle(args, before[list(SLOTS)])
    step.run(args, pool, {"read": int32(*SLOTS), "write": write, "each": each})
    kept = (write >= 0) & torch.tensor([each, each, True])
    for row, t in kept.nonzero().tolist():
        close(pool[write[row, t]], states[row, t], step.state_tolerance())
    same_but_for(write[kept], pool, before)


def spread(t: Tensor) -> Tensor:
    """The same values, no two of them side by side."""
    return torch.stack((t, t), -1)[..., 0]


def wrong_inputs(step: Step) -> Wrong:
    """What each input is refused for, whatever it means."""
    wrong: Wrong = {}
    for name in step.tokens + step.fixed:
        wrong |= {
            f"{name} dtype": (put(name, Tensor.double), f"^{name} has dtype torch.float64"),
            f"{name} device": (put(name, lambda t: t.to("meta")), f"^{name} is on meta"),
        }
        if name in step.leads:
            wrong[f"{name} dims"] = put(name, lambda t: t[0]), f"^{name} has shape .* dimensions"
        else:
            wrong[f"{name} shape"] = put(name, lambda t: t[..., 1:]), f"^{name} has shape"
    for name in step.tokens:
        apart, uneven = f"^{name} has strides .*last must be", f"^{name} has strides .*evenly"
        wrong |= {
            f"{name} strides": (put(name, spread), apart),
            f"{name} spacing": (put(name, lambda t: torch.cat((t, t), 1)[:, :2]), uneven),
        }
    for name in step.tokens[1:]:
        wrong |= {
            f"{name} batch": (put(name, lambda t: t[1:]), f"^{name} has shape"),
            f"{name} tokens": (put(name, lambda t: t[:, 1:]), f"^{name} has shape"),
        }
    return wrong


def wrong_slots(state: str) -> Wrong:
    """What the pool of states and its slots are refused for."""
    wrong: Wrong = {
        f"{state} shape": (put(state, lambda t: t[..., 1:]), f"^{state} has shape"),
        f"{state} inner shape": (put(state, lambda t: t[:, 1:]), f"^{state} has shape"),
        f"{state} dims": (put(state, lambda t: t[0]), f"^{state} has shape"),
        f"{state} dtype": (put(state, Tensor.half), f"^{state} has dtype torch.float16"),
        f"{state} strides": (
            put(state, spread),
            f"^{state} has strides .*each slot must be contiguous",
        ),
        f"{state} overlap": (
            put(state, lambda t: t[:1].expand(t.shape)), f"^{state} has strides"
        ),
    }  # fmt: skip
    for name in ("read", "write", "new"):
        wrong |= {
            f"{name} shape": (put(name, lambda t: t[..., 1:]), f"^{name} has shape"),
            f"{name} dtype": (put(name, Tensor.long), f"^{name} is torch.int64"),
            f"{name} strides": (put(name, spread), f"^{name} is .*strides"),
            f"{name} device": (put(name, lambda t: t.to("meta")), f"^{name} is .* on meta"),
        }
    return wrong


REFUSED = [
    pytest.param(step, *wrong, id=f"{name}-{what}")
    for name, step in STEPS.items()
    for what, wrong in (wrong_inputs(step) | wrong_slots(step.state) | step.wrong).items()
]


@pytest.mark.parametrize(("step", "spoil", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_any_launch(
    step: Step, spoil: Callable[[Args], Args], message: str, interpreter: None
) -> None:
    args = step.fitting()
    step.refuses(args | spoil(args), message)


@pytest.mark.parametrize("what", WRONG_NORMS)
@pytest.mark.parametrize(("step", "norm"), NORMED)
def test_a_norm_that_does_not_fit_is_refused(
    step: Step, norm: Norm, what: str, interpreter: None
) -> None:
    args, (spoil, message) = step.fitting(norm=norm), WRONG_NORMS[what]
    step.refuses(args | {"norm": replace(args["norm"], **spoil(args["norm"]))}, message)


@pytest.mark.parametrize("what", WRONG_ARRIVALS)
@pytest.mark.parametrize(("step", "norm"), NORMED)
def test_counters_that_do_not_fit_are_refused(
    step: Step, norm: Norm, what: str, interpreter: None
) -> None:
    arrivals, message = WRONG_ARRIVALS[what]
    step.refuses(step.fitting(norm=norm) | {"arrivals": arrivals}, message)


@pytest.mark.parametrize("tokens", [0, 10])
@every_step
def test_token_counts_outside_1_to_9_are_refused(
    step: Step, tokens: int, interpreter: None
) -> None:
    step.refuses(step.fitting(tokens), f"K={tokens} new tokens")


@every_step
def test_an_empty_batch_is_refused(step: Step, interpreter: None) -> None:
    args = step.fitting()
    empty = {name: x[:0] for name, x in step.rows(args).items()}
    step.refuses(args | empty | in_place((), 2), "B=0, K=2 new tokens")


@every_step
def test_cpu_tensors_are_refused_outside_the_interpreter(step: Step) -> None:
    step.refuses(step.fitting(), f"{step.state}=.*is on cpu, needs cuda")
