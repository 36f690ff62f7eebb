"""Operands of the recurrent step kernels, and their torch forms with the glue around them.

Arguments are those of three sequences, without states and slots, and the shape of one's state.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.ops.shift import blended
from archs.ops.wkv import WkvWeights, finished, rule
from kernels.conv.shift import token_shift_ref
from kernels.conv.torch import causal_conv, conv_tail
from kernels.decay.torch import decay_step
from kernels.dplr.torch import dplr_step
from kernels.gated_delta import torch as gdn_torch
from kernels.norm.torch import OutputNorm, l2_norm
from kernels.rope.torch import apply_rope
from kernels.selective import torch as selective_torch
from tests.kernels.output_norms import normed, output_norm

SLOTS = (4, 1, 3)
B, POOL = len(SLOTS), 6
#: Tokens before a linear step that is turned; the longest sequence ends with the table.
PAST, POSITIONS = (7, 0, 12), 21
F32, BF16 = torch.float32, torch.bfloat16

Args = dict[str, Any]
#: Arguments without the states and their slots, and the shape of one sequence's state.
Made = tuple[Args, tuple[int, ...]]
#: "heads": head by head, gated after; "sigmoid": so, but opened by a sigmoid; a number: of groups,
#: gated before.
Norm = str | int


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def columns(k: int, dtype: torch.dtype, *widths: int) -> tuple[Tensor, ...]:
    """Neighbouring columns of one tensor, as a projection leaves them, after three unused ones."""
    return torch.randn(B, k, 3 + sum(widths)).to(dtype).split((3, *widths), -1)[1:]


def heads(t: Tensor, count: int) -> Tensor:
    return t.unflatten(-1, (count, -1))


def norm_of(norm: Norm | None, k: int, h: int, p: int, dtype: torch.dtype) -> OutputNorm | None:
    groups = norm if isinstance(norm, int) else None
    opened = "sigmoid" if norm == "sigmoid" else "silu"
    return None if norm is None else output_norm(k, h, p, dtype, groups, opened)


def gdn_arguments(
    k: int, dtype: torch.dtype, n: int = 16, p: int = 16, g: int = 1, h: int = 2,
    norm: Norm | None = None, beta_max: float = 1.0,
) -> Made:  # fmt: skip
    q, key, v = columns(k, dtype, g * n, g * n, h * p)
    a, b = columns(k, dtype, h, h)
    return {
        "q": heads(q, g), "k": heads(key, g), "v": heads(v, h), "a": a, "b": b,
        "a_log": torch.linspace(-3, 1, h), "dt_bias": torch.linspace(-6, 0.5, h),
        "norm": norm_of(norm, k, h, p, dtype), "beta_max": beta_max,
    }, (h, n, p)  # fmt: skip


def kda_arguments(k: int, dtype: torch.dtype, n: int = 16, h: int = 2, **sizes: Any) -> Made:
    """As `gdn_arguments`, decays by channel."""
    args, state = gdn_arguments(k, dtype, n=n, h=h, **sizes)
    (a,) = columns(k, dtype, h * n)
    return args | {"a": heads(a, h), "dt_bias": torch.linspace(-6, 2, h * n).view(h, n)}, state


def erasing_arguments(k: int, dtype: torch.dtype, n: int = 16, h: int = 2, **sizes: Any) -> Made:
    """As `kda_arguments`, strengths by channel, too."""
    args, state = kda_arguments(k, dtype, n=n, h=h, **sizes)
    (b,) = columns(k, dtype, h * n)
    return args | {"b": heads(b, h)}, state


def product_arguments(
    k: int, dtype: torch.dtype, n: int = 16, p: int = 16, g: int = 1, h: int = 2,
    products: int = 2, **more: Any,
) -> Made:  # fmt: skip
    """As `gdn_arguments`, several products a token."""
    args, state = gdn_arguments(k, dtype, n=n, p=p, g=g, h=h, **more)
    key, v = columns(k, dtype, products * g * n, products * h * p)
    (b,) = columns(k, dtype, products * h)
    return args | {
        "k": key.unflatten(-1, (products, g, n)), "v": v.unflatten(-1, (products, h, p)),
        "b": b.unflatten(-1, (products, h)),
    }, state  # fmt: skip


def gdn_form(args: Args, state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.gated_delta.torch.gdn_step` with the glue of `archs.ops.gated_delta` around it."""
    q, k = l2_norm(args["q"]), l2_norm(args["k"])
    rate = -args["a_log"].exp().view(-1, *[1] * (args["a"].dim() - 3))
    decay = F.softplus(args["a"].float() + args["dt_bias"]) * rate
    scaled, beta = q * q.shape[-1] ** -0.5, args["beta_max"] * args["b"].sigmoid()
    inputs = gdn_torch.product_steps(scaled, k, args["v"], decay, beta)
    y, each = gdn_torch.gdn_step(*inputs, state, each=True)
    last = gdn_torch.last_product(k)
    assert each is not None
    return normed(y[:, last], args["norm"]), each[:, last]


def ssm_arguments(
    k: int, dtype: torch.dtype, n: int = 16, p: int = 16, g: int = 1, h: int = 2,
    norm: Norm | None = None,
) -> Made:  # fmt: skip
    x, b, c = columns(k, dtype, h * p, g * n, g * n)
    (dt,) = columns(k, dtype, h)
    return {
        "x": heads(x, h), "dt": dt, "b": heads(b, g), "c": heads(c, g),
        "a_log": torch.linspace(0, 2, h), "d": torch.linspace(-1, 1, h),
        "dt_bias": torch.linspace(-6, 0.5, h), "norm": norm_of(norm, k, h, p, dtype),
    }, (h, n, p)  # fmt: skip


def ssm_form(args: Args, state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.decay.torch.decay_step` with the glue of `archs.mamba2` around it."""
    x, dt = args["x"], F.softplus(args["dt"].float() + args["dt_bias"])
    fed, decay = x * dt[..., None].to(x.dtype), dt * -args["a_log"].exp()
    y, each = decay_step(args["c"], args["b"], fed, decay, state, each=True)
    assert each is not None
    return normed(torch.addcmul(y, x, args["d"][:, None].to(x.dtype)), args["norm"]), each


def linear_arguments(
    k: int, dtype: torch.dtype, n: int = 16, p: int = 16, g: int = 1, h: int = 2,
    turn: bool = False, norm: Norm | None = None,
) -> Made:  # fmt: skip
    q, key, v = columns(k, dtype, g * n, g * n, h * p)
    rotation = {"cos_sin": angles(POSITIONS, n), "past": int32(*PAST)} if turn else {}
    return rotation | {
        "q": heads(q, g), "k": heads(key, g), "v": heads(v, h),
        "log_decay": torch.linspace(-0.5, -0.001, h), "scale": n**-0.5,
        "norm": norm_of(norm, k, h, p, dtype),
    }, (h, n, p)  # fmt: skip


def angles(positions: int, n: int) -> Tensor:
    """Cosines and sines of a fresh angle for each position and pair."""
    found = torch.rand(positions, n // 2) * 6.3
    return torch.stack((found.cos(), found.sin()), -1)


def linear_form(args: Args, state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.decay.torch.decay_step` with the glue of `archs.ops.decay` around it."""
    decay, q, k = args["log_decay"][None, None], args["q"], args["k"]
    if "past" in args:
        at = args["past"].long()[:, None] + torch.arange(q.shape[1])
        turn = torch.view_as_complex(args["cos_sin"])[at][:, :, None]
        q, k = (apply_rope(t.contiguous(), turn) for t in (q, k))
    y, each = decay_step(q, k, args["v"], decay, state, each=True)
    assert each is not None
    return normed(y * args["scale"], args["norm"]), each


def selective_arguments(
    k: int, dtype: torch.dtype, e: int = 100, n: int = 16, gate: bool = True
) -> Made:
    x, z = columns(k, dtype, e, e)
    b, c = columns(k, dtype, n, n)
    args = {
        "x": x, "dt": torch.randn(B, k, e).to(dtype), "b": b, "c": c,
        "a_log": torch.arange(1, n + 1).float().log().expand(e, -1).contiguous(),
        "d": torch.linspace(-1, 1, e), "dt_bias": torch.linspace(-6, 0.5, e),
    }  # fmt: skip
    return args | ({"z": z} if gate else {}), (e, n)


def selective_form(args: Args, state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.selective.torch.selective_step` with the glue of `archs.mamba1` around it."""
    dt, a = F.softplus(args["dt"].float() + args["dt_bias"]), -args["a_log"].exp()
    inputs = (args["x"], dt, a, args["b"], args["c"], args["d"])
    y, each = selective_torch.selective_step(*inputs, state, each=True)
    assert each is not None
    return y * F.silu(args["z"]) if "z" in args else y, each


#: Names of the weights of `kernels.dplr.step.wkv_step`.
WKV_WEIGHTS = WkvWeights._fields


def wkv_arguments(k: int, dtype: torch.dtype, n: int = 16, p: int = 16, h: int = 2) -> Made:
    r, key, decay, rate, v = columns(k, dtype, *[h * n] * 4, h * p)
    weights = [torch.randn(h, n) for _ in range(5)] + [torch.randn(h, p) for _ in range(2)]
    return {
        "r": heads(r, h), "k": heads(key, h), "v": heads(v, h), "decay": heads(decay, h),
        "rate": heads(rate, h), **dict(zip(WKV_WEIGHTS, weights, strict=True)), "eps": 64e-5,
        # A head's products with it add up to about 1, as y does once it is normed.
        "bonus": torch.randn(h, n) * n**-0.5,
    }, (h, n, p)  # fmt: skip


def wkv_form(args: Args, state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.dplr.torch.dplr_step` with the glue of `archs.ops.wkv` around it."""
    weights = WkvWeights(*(args[name].to(args["r"].dtype) for name in WKV_WEIGHTS))
    tokens = rule(*(args[name] for name in ("k", "v", "decay", "rate")), weights)
    y, each = dplr_step(args["r"], *tokens, state, each=True)
    assert each is not None
    return finished(y, args["r"], tokens, weights, args["eps"]).view_as(y), each


def shift_arguments(k: int, dtype: torch.dtype, d: int = 300, w: int = 6) -> Made:
    (x,) = columns(k, dtype, d)
    return {"x": x, "blend": torch.rand(w, d)}, (1, d)


def shift_ref(tail: Tensor, **args: Tensor) -> tuple[Tensor, Tensor]:
    """The blends of each token side by side, [B, K, W, D]."""
    y, each = token_shift_ref(**args, tail=tail)
    return y.movedim(0, 2), each


def shift_form(args: Args, tail: Tensor) -> tuple[Tensor, Tensor]:
    """The blends as `archs.ops.shift` makes them."""
    x = args["x"]
    before = torch.cat((tail.to(x.dtype), x[:, :-1]), 1)
    return blended(x, before, args["blend"]).movedim(0, 2), x.unsqueeze(2).float()


def conv_arguments(
    k: int, dtype: torch.dtype, c: int = 300, w: int = 4, bias: bool = True, silu: bool = True
) -> Made:
    (x,) = columns(k, dtype, c)
    weight, shift = torch.randn(c, w).to(dtype), torch.randn(c).to(dtype)
    args = {"x": x, "weight": weight, "bias": shift if bias else None, "silu": silu}
    return args, (w - 1, c)


def conv_form(args: Args, tail: Tensor) -> tuple[Tensor, Tensor]:
    x, width = args["x"], args["weight"].shape[1]
    y = causal_conv(x, args["weight"], args["bias"], tail, silu=args["silu"])
    after = [conv_tail(x, tail, width, new=torch.full((B,), t + 1)) for t in range(x.shape[1])]
    return y, torch.stack(after, 1)
