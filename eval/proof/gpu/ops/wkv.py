"""RWKV-7's step and its token shift on a device, by their bytes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from archs.ops.shift import blended
from archs.ops.wkv import Rule, WkvWeights, finished, rule
from eval.proof.gpu.case import Case, Check, Op, Run
from eval.proof.gpu.ops.operands import bytes_of, random, slots
from eval.proof.gpu.ops.recurrent import BF16_LIMIT, Form, in_slots, scattered, step_op
from eval.proof.gpu.ops.recurrent_baselines import where_installed
from kernels.conv.shift import token_shift, token_shift_ref
from kernels.dplr.step import wkv_ring_row, wkv_step, wkv_step_ref
from kernels.dplr.torch import dplr_step

Pairs = Sequence[tuple[Tensor, Tensor]]
Inputs = dict[str, Tensor]
EPS = 64e-5
BLENDS = 6


def inputs_of(b: int, k: int, sizes: tuple[int, ...], device: torch.device) -> Inputs:
    """sizes are H, N, P."""
    heads, n, p = sizes
    wide = {"r": n, "k": n, "v": p, "decay": n, "rate": n}
    tokens = {name: random(b, k, heads, width, device=device) for name, width in wide.items()}
    of_keys = [random(heads, n, device=device) for _ in range(5)]
    of_values = [random(heads, p, device=device) for _ in range(2)]
    return tokens | WkvWeights(*of_keys, *of_values)._asdict()


def others(i: Inputs, pool: Tensor) -> Mapping[str, Run]:
    """Torch's form, and fla's recurrence between torch's gates and norm."""
    weights = WkvWeights(*(i[name] for name in WkvWeights._fields))

    def tokens() -> Rule:
        return rule(i["k"], i["v"], i["decay"], i["rate"], weights)

    def normed(y: Tensor, of: Rule) -> Tensor:
        return finished(y, i["r"], of, weights, EPS).view_as(y)

    def by_torch() -> Tensor:
        of = tokens()
        return normed(dplr_step(i["r"], *of, pool)[0], of)

    def by_library() -> Run:
        from fla.ops.rwkv7 import fused_recurrent_rwkv7

        def both() -> Tensor:
            of = tokens()
            y, _ = fused_recurrent_rwkv7(
                i["r"], of.log_decay, of.k, of.v, of.a, of.b, scale=1.0, initial_state=pool,
                output_final_state=True,
            )  # fmt: skip
            return normed(y, of)

        return both

    return {"torch": by_torch, **where_installed("fla", by_library)}


def check_shift(tokens: int) -> Callable[[torch.device], Pairs]:
    """Blends, and tails of scattered slots."""

    def run(device: torch.device) -> Pairs:
        x, pool = random(3, tokens, 520, device=device), random(18, 1, 520, device=device)
        blend, before = random(BLENDS, 520, device=device), pool.clone()
        at = scattered(tokens, device)
        held = [t.cpu() for t in (x, blend, pool[at["read"].long()])]
        expected, tails = token_shift_ref(*held)
        y = token_shift(x, blend, pool, **at, each=True)
        return [(y, expected), *in_slots(pool, before, tokens, tails)]

    return run


def shift_case(batch: int, width: int) -> Case:
    """One token of each sequence."""

    def build(device: torch.device) -> Mapping[str, Run]:
        x, pool = random(batch, 1, width, device=device), random(batch, 1, width, device=device)
        blend, at = random(BLENDS, width, device=device), slots(batch, device)

        def by_torch() -> Tensor:
            y = blended(x, pool, blend)
            pool.copy_(x)
            return y

        return {"triton": lambda: token_shift(x, blend, pool, at, at[:, None]), "torch": by_torch}

    x = torch.empty(batch, 1, width, dtype=torch.bfloat16, device="meta")
    return Case(
        name=f"{width} channels bf16 batch {batch}", order=3,
        moved_bytes=bytes_of(*[x] * (3 + BLENDS)) + 2 * BLENDS * width,
        flops=3 * BLENDS * batch * width, build=build,
    )  # fmt: skip


WKV = Form(
    step=partial(wkv_step, eps=EPS),
    reference=partial(wkv_step_ref, eps=EPS),
    make=inputs_of,
    others=others,
    row=wkv_ring_row,
)

OPS = (
    step_op("wkv_step", [WKV], (4, 64, 64), [(32, 64, 64), (32, 64, 128)], 7),
    Op(
        name="token_shift",
        checks=[
            Check(name=f"520 new {k}", run=check_shift(k), limit=BF16_LIMIT) for k in (1, 4)
        ],
        cases=[shift_case(64, 4096), shift_case(1, 4096)],
    ),
)  # fmt: skip
