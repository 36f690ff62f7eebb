"""Rings for the tests of step kernels (`kernels.recurrent.ring`): rows, books and the oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.decay import linear_step, ssm_step
from kernels.dplr import step as dplr_step
from kernels.gated_delta import step as gdn_step
from kernels.norm.torch import OutputNorm
from kernels.recurrent.ring import Ring
from kernels.recurrent.step_norm import output_norm_ref
from kernels.rope import rotate as rope_rotate
from tests.kernels.step_inputs import Args, angles, int32
from tests.kernels.steps import STEPS, Step

#: Inputs that a row holds, in its order, and what says how wide it is.
LAYOUTS: dict[str, tuple[str, Callable[[int, int, int, int], int]]] = {
    "gdn": ("kvab", gdn_step.gdn_ring_row),
    "kda": ("kvab", partial(gdn_step.gdn_ring_row, by_channel=True)),
    "gdn2": ("kvab", partial(gdn_step.gdn_ring_row, by_channel=True, erases=True)),
    "products": ("kvab", partial(gdn_step.gdn_ring_row, products=2)),
    "ssm": ("x b dt", ssm_step.ssm_ring_row),
    "linear": ("kv", linear_step.linear_ring_row),
    "wkv": ("k v decay rate", lambda _, h, n, p: dplr_step.wkv_ring_row(h, n, p)),
}


@dataclass(frozen=True, kw_only=True)
class Books:
    """Per sequence: tokens before the step, how many the state lacks, how many it takes in."""

    past: Sequence[int]
    held: Sequence[int]
    fold: Sequence[int]
    rows: int = 16

    def ring(self, pool: Tensor) -> Ring:
        return Ring(pool, int32(*self.past), int32(*self.held), int32(*self.fold))


def row_width(name: str, args: Args, state: Tensor) -> int:
    heads, n, p = state.shape[1:]
    groups = args["b" if name == "ssm" else "k"].shape[-2]
    return LAYOUTS[name][1](groups, heads, n, p)


def turned(args: Args, past: Sequence[int]) -> Args:
    """The arguments of a linear step that is turned, at these positions."""
    if "past" not in args:
        return {}
    return {"cos_sin": angles(64, args["q"].shape[-1]), "past": int32(*past)}


def packed(name: str, args: Args) -> Tensor:
    """Rows of all tokens, [B, T, row]."""
    words = LAYOUTS[name][0]
    inputs = {key: args[key] for key in (words.split() if " " in words else words)}
    if "past" in args:
        k = inputs["k"].clone()
        inputs["k"] = rope_rotate.rope_rotate(k, args["cos_sin"], args["past"])
    return torch.cat([t.flatten(2) for t in inputs.values()], -1)


def ring_ref(
    step: Step, history: Args, args: Args, books: Books, states: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The oracle: y of the new tokens [B, K, ...]; per sequence, the state at first and after every
    held and new token.

    history: arguments whose first tokens are the held ones; states: [B, ...].
    """
    rows, outputs, after = step.rows(args), [], []
    for b, (past, held) in enumerate(zip(books.past, books.held, strict=True)):
        one = {name: torch.cat((history[name][b : b + 1, :held], t[b : b + 1]), 1)
               for name, t in rows.items()}  # fmt: skip
        more = {"past": int32(past - held)} if "past" in args else {}
        norm = {"norm": None} if step.norms else {}
        y, found = step.oracle(args | one | more | norm, states[b : b + 1])
        outputs.append(y[:, held:])
        after.append(torch.cat((states[b : b + 1].double(), found[0])))
    after_all: OutputNorm | None = args.get("norm")
    return output_norm_ref(torch.cat(outputs), after_all), after


RINGED = {name: STEPS[name] for name in LAYOUTS}
