"""Recurrent updates on a device, by their bytes: the state is read and written once.

Each alone, and as the engine launches it: with the norm of its output, retention with its rotation.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.proof.gpu.case import Case, Check, Op, Run, installed
from eval.proof.gpu.ops import recurrent_baselines as baselines
from eval.proof.gpu.ops.operands import bytes_of, on_cpu, random, slots
from eval.proof.gpu.ops.recurrent_baselines import Baselines
from eval.proof.gpu.ops.recurrent_rings import answers, check_ring, ring_case
from kernels.conv import step as conv_step
from kernels.decay import linear_step, ssm_step
from kernels.gated_delta import step as gdn_step
from kernels.selective import step as selective_step

BF16_LIMIT = 8e-3
#: Products of a token where it has several.
PRODUCTS = 2
Pairs = Sequence[tuple[Tensor, Tensor]]
Make = Callable[..., dict[str, Tensor]]


def ssm_inputs(b: int, k: int, sizes: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Mamba-2's: sizes are H, N, P; one group."""
    heads, n, p = sizes
    return {
        "x": random(b, k, heads, p, device=device), "dt": random(b, k, heads, device=device),
        "b": random(b, k, 1, n, device=device), "c": random(b, k, 1, n, device=device),
        **_per_head(heads, device), "d": random(heads, device=device, dtype=torch.float32),
    }  # fmt: skip


def gdn_inputs(b: int, k: int, sizes: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """The gated delta rule's: sizes are H, N, P; a key head per value head."""
    heads, n, p = sizes
    return {
        "q": random(b, k, heads, n, device=device), "k": random(b, k, heads, n, device=device),
        "v": random(b, k, heads, p, device=device), "a": random(b, k, heads, device=device),
        "b": random(b, k, heads, device=device), **_per_head(heads, device),
    }  # fmt: skip


def kda_inputs(b: int, k: int, sizes: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """As `gdn_inputs`, decays by key channel."""
    heads, n, _ = sizes
    return gdn_inputs(b, k, sizes, device) | {
        "a": random(b, k, heads, n, device=device),
        "dt_bias": random(heads, n, device=device, dtype=torch.float32),
    }


def gdn2_inputs(b: int, k: int, sizes: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """As `kda_inputs`, strengths by channel, too."""
    heads, n, _ = sizes
    return kda_inputs(b, k, sizes, device) | {"b": random(b, k, heads, n, device=device)}


def product_inputs(
    b: int, k: int, sizes: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """As `gdn_inputs`, `PRODUCTS` a token."""
    heads, n, p = sizes
    each = partial(random, b, k, PRODUCTS, heads, device=device)
    return gdn_inputs(b, k, sizes, device) | {"k": each(n), "v": each(p), "b": each()}


def linear_inputs(
    b: int, k: int, sizes: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Retention's: sizes are H, N, P."""
    heads, n, p = sizes
    decay = -torch.rand(heads, device=device) / 8
    return {
        "q": random(b, k, heads, n, device=device), "k": random(b, k, heads, n, device=device),
        "v": random(b, k, heads, p, device=device), "log_decay": decay,
    }  # fmt: skip


def selective_inputs(
    b: int, k: int, sizes: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Mamba's: sizes are E, N."""
    width, n = sizes
    a_log = torch.arange(1, n + 1, device=device).log().expand(width, n).contiguous()
    ones = torch.ones(width, device=device)
    return {
        "x": random(b, k, width, device=device), "dt": random(b, k, width, device=device),
        "b": random(b, k, n, device=device), "c": random(b, k, n, device=device),
        "a_log": a_log, "d": ones, "dt_bias": ones / 8, "z": random(b, k, width, device=device),
    }  # fmt: skip


def normed_inputs(make: Make, *, flat: bool) -> Make:
    """The same with an output norm head by head, or over all heads, and its counters."""

    def run(b: int, k: int, sizes: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        heads, _, p = sizes
        inner = (heads * p,) if flat else (heads, p)
        return make(b, k, sizes, device) | {
            "gate": random(b, k, *inner, device=device), "weight": random(inner[-1], device=device),
            "arrivals": torch.zeros(b if flat else b * heads, dtype=torch.int32, device=device),
        }  # fmt: skip

    return run


def normed(step: Callable[..., Any], opened: str) -> Callable[..., Any]:
    """A step, or its reference, that takes the tensors of its output norm by name."""

    def run(gate: Tensor, weight: Tensor, **tensors: Tensor) -> Any:
        norm = baselines.output_norm({"gate": gate, "weight": weight}, opened)
        return step(**tensors, norm=norm)

    return run


def turned_inputs(
    b: int, k: int, sizes: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Retention's with the rotation of q and k; every sequence has another length."""
    angle = torch.rand(b + k - 1, sizes[1] // 2, device=device) * 6
    turn = {"cos_sin": torch.stack((angle.cos(), angle.sin()), -1), "past": slots(b, device)}
    return linear_inputs(b, k, sizes, device) | turn


def _per_head(heads: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "a_log": torch.rand(heads, device=device),
        "dt_bias": random(heads, device=device, dtype=torch.float32),
    }


def scattered(tokens: int, device: torch.device) -> dict[str, Tensor]:
    """`read` and `write` of three sequences: two read one slot, the other is updated in place, and
    the first of several states is not kept.
    """
    write = torch.arange(6, 6 + 3 * tokens, dtype=torch.int32).view(3, tokens)
    write[1, -1] = 1
    if tokens > 1:
        write[0, 0] = -1
    read = torch.tensor([4, 1, 4], dtype=torch.int32)
    return {"read": read.to(device), "write": write.to(device)}


def in_slots(pool: Tensor, before: Tensor, tokens: int, states: Tensor) -> Pairs:
    """What lies in the slots of a pool against the states [3, K, ...], and that all else stayed."""
    write = scattered(tokens, torch.device("cpu"))["write"].flatten().tolist()
    kept = [row for row, slot in enumerate(write) if slot >= 0]
    others = [slot for slot in range(len(pool)) if slot not in write]
    at = torch.tensor([write[row] for row in kept]).to(pool.device)
    rest = torch.tensor(others).to(pool.device)
    return [(pool[at], states.flatten(0, 1)[torch.tensor(kept)]), (pool[rest], before[rest])]


def check_step(
    step: Callable[..., Tensor], reference: Callable[..., tuple[Tensor, Tensor]], make: Make,
    sizes: tuple[int, ...], tokens: int, dtype: torch.dtype,
) -> Callable[[torch.device], Pairs]:  # fmt: skip
    """Outputs, and the states after all tokens in scattered slots."""

    def run(device: torch.device) -> Pairs:
        inputs = make(3, tokens, sizes, device)
        pool = random(6 + 3 * tokens, *sizes, device=device, dtype=dtype)
        before, at = pool.clone(), scattered(tokens, device)
        held = {name: t.cpu() for name, t in inputs.items() if name != "arrivals"}
        expected, states = reference(**held, state=pool[at["read"].long()].cpu())
        y = step(**inputs, state=pool, **at, each=True)
        pairs = [(y, expected), *in_slots(pool, before, tokens, states)]
        left = inputs.get("arrivals")
        return pairs if left is None else [*pairs, (left, torch.zeros_like(left))]

    return run


def step_case(
    order: int, step: Callable[..., Tensor], make: Make, sizes: tuple[int, ...], batch: int,
    dtype: torch.dtype, flops: int, others: Baselines, more: str = "",
) -> Case:  # fmt: skip
    """One token for each of `batch` sequences; flops: of each element of the state, which take
    nearly all; more: what the step does beside, for the name.
    """

    def build(device: torch.device) -> Mapping[str, Run]:
        inputs = make(batch, 1, sizes, device)
        pool, at = random(batch, *sizes, device=device, dtype=dtype), slots(batch, device)
        place = {"read": at, "write": at[:, None]}
        return {"triton": lambda: step(**inputs, state=pool, **place), **others(inputs, pool)}

    shapes = make(batch, 1, sizes, torch.device("meta"))
    size = batch * math.prod(sizes)
    kind = str(dtype).removeprefix("torch.")
    return Case(
        name=f"{'x'.join(map(str, sizes))} {kind} state batch {batch}{more}", order=order,
        moved_bytes=2 * size * dtype.itemsize + bytes_of(answers(shapes), *shapes.values()),
        flops=flops * size, build=build,
        late=tuple(name for name in ("mamba-ssm", "fla") if installed(name)),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """A step, its oracle, its inputs and what others make of them; more: what it does beside; row:
    from sizes to the width of a ring's row, where the step takes one.
    """

    step: Callable[..., Tensor]
    reference: Callable[..., tuple[Tensor, Tensor]]
    make: Make
    others: Baselines
    more: str = ""
    row: Callable[..., int] | None = None

    def normed(self, *, flat: bool = False, opened: str = "silu") -> "Form":
        """With the output norm."""
        return Form(
            step=normed(self.step, opened), reference=normed(self.reference, opened),
            make=normed_inputs(self.make, flat=flat),
            others=baselines.normed(self.others, opened),
            more=f"{self.more} normed", row=self.row,
        )  # fmt: skip


def step_op(
    name: str, forms: Sequence[Form], checked: tuple[int, ...], timed: Sequence[tuple[int, ...]],
    flops: int,
) -> Op:  # fmt: skip
    """Checks and cases of a step kernel. forms: the engine's first; checked, timed: sizes of its
    states; flops: of each of their elements.
    """
    kinds = (torch.float32, torch.bfloat16)
    checks = [
        Check(
            name=f"{'x'.join(map(str, checked))} new {k} {str(dtype)[6:]}{form.more}",
            limit=BF16_LIMIT,
            run=check_step(form.step, form.reference, form.make, checked, k, dtype),
        )
        for form in forms
        for k in (1, 4, 8)
        for dtype in kinds
    ]
    cases = [
        step_case(0 if form is forms[0] and batch == 64 and dtype == kinds[0] else 2, form.step,
                  form.make, sizes, batch, dtype, flops, form.others, form.more)
        for form in forms
        for sizes in timed
        for batch in (64, 1, 512)
        for dtype in kinds
    ]  # fmt: skip
    if forms[0].row is not None:
        first, row = forms[0], forms[0].row
        checks += [
            Check(
                name=f"{'x'.join(map(str, checked))} new {k} ring{first.more}",
                limit=BF16_LIMIT,
                run=check_ring(first.step, first.reference, first.make, checked, row(*checked), k),
            )
            for k in (1, 5)
        ]
        cases.append(ring_case(1, first.step, first.make, timed[0], row(*timed[0]), 64, flops,
                               first.others, first.more))  # fmt: skip
    return Op(name=name, checks=checks, cases=cases)


def check_conv(device: torch.device) -> Pairs:
    """Outputs and tails of scattered slots, four tokens."""
    x, pool = random(3, 4, 512, device=device), random(18, 3, 512, device=device)
    weight, bias = random(512, 4, device=device), random(512, device=device)
    before, at = pool.clone(), scattered(4, device)
    held: list[Any] = on_cpu(x, weight, bias, pool[at["read"].long()])
    expected, tails = conv_step.conv_step_ref(*held)
    got = conv_step.conv_step(x, weight, bias, pool, at["read"], at["write"], each=True)
    return [(got, expected), *in_slots(pool, before, 4, tails)]


def conv_case(batch: int, channels: int) -> Case:
    """One token through a convolution of width 4."""

    def build(device: torch.device) -> Mapping[str, Run]:
        x = random(batch, 1, channels, device=device)
        pool = random(batch, 3, channels, device=device)
        weight, bias = random(channels, 4, device=device), random(channels, device=device)
        at = slots(batch, device)

        def by_torch() -> Tensor:
            seen = torch.cat((pool, x), 1)
            pool.copy_(seen[:, 1:])
            summed = torch.einsum("bwc,cw->bc", seen, weight)
            return F.silu(summed + bias)[:, None]

        return {
            "triton": lambda: conv_step.conv_step(x, weight, bias, pool, at, at[:, None]),
            "torch": by_torch,
        }  # fmt: skip

    moved = 2 * channels * (8 * batch + 5)
    return Case(name=f"{channels} channels bf16 batch {batch}", order=3, moved_bytes=moved,
                flops=9 * batch * channels, build=build)  # fmt: skip


SSM = Form(step=ssm_step.ssm_step, reference=ssm_step.ssm_step_ref, make=ssm_inputs,
           others=baselines.ssm, row=lambda h, n, p: ssm_step.ssm_ring_row(1, h, n, p))  # fmt: skip
GDN = Form(step=gdn_step.gdn_step, reference=gdn_step.gdn_step_ref, make=gdn_inputs,
           others=baselines.gdn, row=lambda h, n, p: gdn_step.gdn_ring_row(h, h, n, p))  # fmt: skip
KDA = Form(step=gdn_step.gdn_step, reference=gdn_step.gdn_step_ref, make=kda_inputs,
           others=baselines.kda,
           row=lambda h, n, p: gdn_step.gdn_ring_row(h, h, n, p, by_channel=True))  # fmt: skip
GDN2 = replace(
    KDA, make=gdn2_inputs, others=baselines.delta_by_torch,
    row=lambda h, n, p: gdn_step.gdn_ring_row(h, h, n, p, by_channel=True, erases=True),
)  # fmt: skip
PRODUCT = replace(
    GDN, make=product_inputs, others=baselines.delta_by_torch,
    row=lambda h, n, p: gdn_step.gdn_ring_row(h, h, n, p, products=PRODUCTS),
)  # fmt: skip
LINEAR = Form(step=linear_step.linear_step, reference=linear_step.linear_step_ref,
              make=linear_inputs, others=baselines.linear,
              row=lambda h, n, p: linear_step.linear_ring_row(h, h, n, p))  # fmt: skip
TURNED = replace(LINEAR, make=turned_inputs, others=baselines.turned(baselines.linear),
                 more=" turned")  # fmt: skip
SELECTIVE = Form(step=selective_step.selective_step, reference=selective_step.selective_step_ref,
                 make=selective_inputs, others=baselines.selective)  # fmt: skip

OPS = (
    step_op("ssm_step", [SSM.normed(flat=True), SSM], (8, 128, 64),
            [(64, 128, 64), (64, 128, 128)], 5),
    step_op("gdn_step", [GDN.normed(), GDN], (4, 128, 128), [(32, 128, 128)], 7),
    step_op("kda_step", [KDA.normed(opened="sigmoid"), KDA], (4, 128, 128), [(32, 128, 128)], 7),
    step_op("gdn2_step", [GDN2.normed(opened="sigmoid")], (4, 128, 128), [(32, 128, 128)], 7),
    step_op("product_step", [PRODUCT.normed()], (4, 128, 128), [(32, 128, 128)],
            3 + 4 * PRODUCTS),
    step_op("linear_step", [TURNED.normed(), LINEAR], (4, 128, 128), [(32, 128, 128)], 5),
    step_op("selective_step", [SELECTIVE], (512, 16), [(4096, 16)], 7),
    Op(name="conv_step", checks=[Check(name="512 new 4", run=check_conv, limit=BF16_LIMIT)],
       cases=[conv_case(64, 6144), conv_case(1, 6144)]),
)  # fmt: skip
