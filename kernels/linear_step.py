"""Linear attention for 1 to 8 new tokens on states in slots: S_t = γ S_{t-1} + k_t v_tᵀ,
y_t = scale · S_tᵀ q_t, with one fixed decay γ per head (retention, arXiv 2307.08621).

B sequences, K new tokens, H heads (of v), G heads of q and k, N key channels, P value channels.
One program updates a [N, BLOCK_P] tile: loaded once, K tokens in float32, stored once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import Variant
from kernels.step import (
    POINTERS,
    require_dims,
    require_heads,
    require_like,
    require_shape,
    require_state,
    row_stride,
)

#: State dtype -> (BLOCK_P, num_warps): 16 bytes per thread, whole 32-byte sectors per row.
CONFIGS: dict[torch.dtype, tuple[int, int]] = {
    torch.float32: (8, 1),
    torch.bfloat16: (16, 1),
}


@triton.jit
def linear_step_fwd_kernel(  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, slots, new, each, y, q_row, k_row, v_row, slot_stride,
    SCALE: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B). Rows of q, k, v, y are tokens; new and each may be None."""
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    slot = tl.load(slots + batch).to(tl.int64)
    count = K
    if new is not None:
        count = tl.load(new + batch)
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    inside = in_n[:, None] & in_p[None, :]
    tile = n[:, None] * P + p[None, :]
    held = state + slot * slot_stride + head * N * P + tile
    s = tl.load(held, mask=inside, other=0.0).to(tl.float32)
    decay = tl.exp(tl.load(log_decay + head).to(tl.float32))
    for t in range(K):
        row = batch * K + t
        valid = t < count
        qt = tl.load(q + row * q_row + group * N + n, mask=in_n & valid, other=0.0).to(tl.float32)
        kt = tl.load(k + row * k_row + group * N + n, mask=in_n & valid, other=0.0).to(tl.float32)
        vt = tl.load(v + row * v_row + head * P + p, mask=in_p & valid, other=0.0).to(tl.float32)
        s = s * tl.where(valid, decay, 1.0) + kt[:, None] * vt[None, :]
        yt = tl.sum(qt[:, None] * s, 0) * SCALE
        tl.store(y + (row * H + head) * P + p, yt.to(y.dtype.element_ty), mask=in_p)
        if each is not None:
            after = each + (row * H + head) * N * P + tile
            tl.store(after, s.to(each.dtype.element_ty), mask=inside)
    tl.store(held, s.to(state.dtype.element_ty), mask=inside & (count > 0))


def linear_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    slots: Tensor,
    *,
    scale: float = 1.0,
    new: Tensor | None = None,
    each: Tensor | None = None,
) -> Tensor:
    """Advance the states of B sequences by K tokens, in place.

    q, k: [B, K, G, N]; v: [B, K, H, P]; log_decay: [H]; state: [slots, H, N, P] in float32 or
    bfloat16; slots: int32 [B], distinct and in range (not checked: it would wait for the device);
    new: int32 [B] valid tokens of right-padded rows (None: K); each: [B, K, H, N, P] in the
    state's dtype, receives the state after every token (padded ones repeat the last).
    Returns y [B, K, H, P] in v's dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_dims("q", q, 4)
    require_dims("v", v, 4)
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[2:]
    require_shape("k", k, (batch, tokens, groups, n))
    require_shape("v", v, (batch, tokens, heads, p))
    require_shape("log_decay", log_decay, (heads,))
    require_heads("v", heads, groups)
    require_state(linear_step_fwd_kernel, state, slots, new, each, (batch, tokens, heads, n, p))
    require_like(state, q=q, k=k, v=v, log_decay=log_decay)
    y = torch.empty(batch, tokens, heads, p, dtype=v.dtype, device=v.device)
    block_p, warps = CONFIGS[state.dtype]
    linear_step_fwd_kernel[(triton.cdiv(p, block_p), heads, batch)](
        q, k, v, log_decay, state, slots, new, each, y,
        row_stride("q", q), row_stride("k", k), row_stride("v", v), state.stride(0),
        SCALE=scale, K=tokens, G=groups, H=heads, N=n, P=p,
        BLOCK_N=triton.next_power_of_2(n), BLOCK_P=block_p, num_warps=warps,
    )  # fmt: skip
    return y


def linear_step_ref(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The oracle: float64, one token at a time; state [B, H, N, P] already taken from its slots.

    Returns y [B, K, H, P] and the state after every token [B, K, H, N, P].
    """
    share = v.shape[2] // q.shape[2]
    q, k = (t.double().repeat_interleave(share, 2) for t in (q, k))
    decay = log_decay.double().exp()[:, None, None]
    s, rows, states = state.double(), [], []
    for t in range(v.shape[1]):
        s = decay * s + k[:, t, :, :, None] * v[:, t, :, None].double()
        rows.append((q[:, t, :, :, None] * s).sum(-2) * scale)
        states.append(s)
    return torch.stack(rows, 1), torch.stack(states, 1)


def variants() -> list[Variant]:
    """Every shape and option that the ahead-of-time test compiles."""
    wide, narrow = torch.float32, torch.bfloat16
    return [
        default_variant(),
        _variant(wide, 128, 256, 8, ragged=True, each=True),
        _variant(wide, 64, 100, 4, ragged=True),
        _variant(narrow, 128, 256, 1),
        _variant(narrow, 128, 256, 8, ragged=True, each=True),
    ]


def default_variant() -> Variant:
    """One token, float32 state, heads of 128 by 256 (the 1b shape)."""
    return _variant(torch.float32, 128, 256, 1)


def _variant(
    dtype: torch.dtype, n: int, p: int, tokens: int, *, ragged: bool = False, each: bool = False
) -> Variant:
    signature = dict.fromkeys(("q", "k", "v", "y"), "*bf16")
    signature |= dict.fromkeys(("q_row", "k_row", "v_row", "slot_stride"), "i32")
    signature |= {"log_decay": "*fp32", "state": POINTERS[dtype], "slots": "*i32"}
    block_p, warps = CONFIGS[dtype]
    block_n = triton.next_power_of_2(n)
    constexprs: dict[str, Any] = {
        "SCALE": n**-0.5, "K": tokens, "G": 8, "H": 8, "N": n, "P": p,
        "BLOCK_N": block_n, "BLOCK_P": block_p,
    }  # fmt: skip
    for name, used, kind in (("new", ragged, "*i32"), ("each", each, POINTERS[dtype])):
        if used:
            signature[name] = kind
        else:
            constexprs[name] = None
    options = f"{'_ragged' if ragged else ''}{'_each' if each else ''}"
    return Variant(
        name=f"linear_step_{POINTERS[dtype][1:]}_{n}x{p}_k{tokens}{options}",
        kernel=linear_step_fwd_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=frozenset(signature),
        num_warps=warps,
        wide_loads=block_n * block_p * dtype.itemsize // (16 * 64 * warps),
    )
