"""The rotation of q and k within the linear step; `test_steps` has what it shares with others."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch

from kernels.norm import rows as norm_triton
from kernels.rope import rotate as rope_rotate
from tests.kernels.interpreter import interpreted
from tests.kernels.output_norms import backwards, normed
from tests.kernels.slots import in_place
from tests.kernels.step_inputs import BF16, F32, POOL, POSITIONS, SLOTS, Args, B, angles, int32
from tests.kernels.steps import STEPS, Wrong, case, close, put

STEP = STEPS["linear"]


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_rotation_and_norm_within_equal_launches_of_their_own(dtype: torch.dtype) -> None:
    """Twice with the same counters, once from the grid's end: whoever comes last norms."""
    args, pool = STEP.made(case(3, p=48, inputs=dtype, turn=True, norm="heads"))
    arrivals, at = torch.zeros(B * 2, dtype=torch.int32), in_place(SLOTS, 3)
    plain, apart = dict(args), pool.clone()
    norm, angle = plain.pop("norm"), (plain.pop("cos_sin"), plain.pop("past"))
    for name in "qk":
        plain[name] = rope_rotate.rope_rotate(args[name].clone(), *angle)
    expected = normed(STEP.run(plain, apart, at), norm, norm_triton.gated_rms_norm)
    for order in (nullcontext(), backwards()):
        within = pool.clone()
        with order:
            y = STEP.run(args, within, at | {"arrivals": arrivals})
        close(y, expected, STEP.y_tolerance(dtype) / 10)
        close(within, apart, 1e-6)
        assert not arrivals.any()


def test_positions_past_the_table_turn_by_nothing() -> None:
    args, pool = STEP.made(case(2, p=32, turn=True))
    plain, turned, at = pool.clone(), pool.clone(), in_place(SLOTS, 2)
    past = int32(POSITIONS, POSITIONS + 3, POSITIONS + 90)
    y = STEP.run(args | {"past": past}, turned, at)
    close(y, STEP.run(args | {"past": None, "cos_sin": None}, plain, at), 1e-6)
    close(turned, plain, 1e-6)


WRONG: Wrong = {
    "cos_sin alone": (lambda _: {"past": None}, "past is None; a rotation needs both"),
    "past alone": (lambda _: {"cos_sin": None}, "cos_sin and past is None"),
    "odd N": (
        lambda x: {n: x[n][..., :15] for n in "qk"} | {"state": torch.zeros(POOL, 2, 15, 16)},
        "^N=15 is odd",
    ),
    "cos_sin shape": (lambda _: {"cos_sin": angles(9, 8)}, "^cos_sin has shape"),
    "cos_sin dims": (put("cos_sin", lambda t: t.flatten(1)), "^cos_sin has shape"),
    "cos_sin dtype": (put("cos_sin", torch.Tensor.double), "^cos_sin=float64"),
    "cos_sin strides": (put("cos_sin", lambda t: t[::2]), "^cos_sin=.*contiguous"),
    "cos_sin device": (put("cos_sin", lambda t: t.to("meta")), "^cos_sin=.*on meta"),
    "past shape": (put("past", lambda t: t[1:]), "^past has shape"),
    "past dtype": (put("past", torch.Tensor.float), "^past=float32"),
    "past device": (put("past", lambda t: t.to("meta")), "^past=.*on meta"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_a_rotation_that_does_not_fit_is_refused(
    spoil: Callable[[Args], Args], message: str
) -> None:
    args = STEP.fitting(turn=True)
    STEP.refuses(args | spoil(args), message)
