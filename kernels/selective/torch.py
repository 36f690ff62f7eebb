"""Mamba's selective scan (S6, arXiv 2312.00752, eq. 2): h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t,
y_t = C_t · h_t + D x_t.

On a CPU the recurrence itself is one fused multiply-add per token over [B, E, N]; what costs is
memory. So it runs in short pieces whose decays, inputs and states stay in cache, and backward
computes each piece again from the state at its start. Inside, tensors are token first and dense:
of a transposed view every result would be one, too, and products would copy it whole. Δ, A and
states are float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Floats of one [piece, B, E, N] buffer: three of them should stay in cache.
PIECE_FLOATS = 1 << 19


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scan over T tokens; differentiable.

    x: [B, T, E]; dt: [B, T, E], after softplus; a: [E, N], negative; b, c: [B, T, N]; d: [E];
    state: [B, E, N] before the first token (None: zeros).
    Returns y [B, T, E] in x's dtype and the state after the last token.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    start = x.new_zeros(x.shape[0], *a.shape, dtype=wide) if state is None else state.to(wide)
    wx, wdt, wa, wb, wc = (t.to(wide) for t in (x, dt, a, b, c))
    wants_grad = any(t.requires_grad for t in (wx, wdt, wa, wb, wc, start))
    if torch.is_grad_enabled() and wants_grad:
        y, final = _SelectiveScan.apply(wx, wdt, wa, wb, wc, start)
    else:
        tx, tdt, tb, tc = _tokens_first(wx, wdt, wb, wc)
        y, final, _ = _scan(tx, tdt, tb, tc, wa, start, keep=False)
        y = y.transpose(0, 1)
    return torch.addcmul(y, wx, d.to(wide)).to(x.dtype), final


def piece_tokens(batch: int, width: int, n: int) -> int:
    """Tokens of one piece."""
    return max(4, PIECE_FLOATS // (batch * width * n))


def _tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, ·] as dense [T, B, ·]."""
    return tuple(t.transpose(0, 1).contiguous() for t in tensors)


def _buffers(x: Tensor, a: Tensor, count: int) -> tuple[Tensor, ...]:
    """Room for `count` tensors [piece, B, E, N], once for all pieces: new memory costs more to
    get than to fill.
    """
    tokens, batch, width = x.shape
    size = min(piece_tokens(batch, width, a.shape[1]), tokens)
    return x.new_empty(count, size, batch, *a.shape).unbind()


def _piece(
    x: Tensor, dt: Tensor, b: Tensor, a: Tensor, start: Tensor, room: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Decays and states of one piece, [t, B, E, N] each and in `room`, and its Δ·x [t, B, E]."""
    decay, states = (buffer[: len(x)] for buffer in room)
    fed = dt * x
    torch.mul(dt[..., None], a, out=decay).exp_()
    torch.mul(fed[..., None], b[:, :, None], out=states)
    for t in range(len(x)):
        start = states[t].addcmul_(decay[t], start)
    return decay, states, fed


def _scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, start: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y [T, B, E] of inputs that are token first, the final state, the state before each piece."""
    room = _buffers(x, a, 2)
    size = len(room[0])
    y = torch.empty_like(x)
    starts = []
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        if keep:
            starts.append(start)
        _, states, _ = _piece(x[rows], dt[rows], b[rows], a, start, room)
        y[rows] = (states @ c[rows][..., None]).squeeze(-1)
        start = states[-1].clone()
    return y, start, starts


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, dt, b, c = _tokens_first(x, dt, b, c)
        y, final, starts = _scan(x, dt, b, c, a, start, keep=True)
        ctx.save_for_backward(x, dt, a, b, c, *starts)
        return y.transpose(0, 1), final

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor, ...]:
        x, dt, a, b, c, *starts = ctx.saved_tensors
        (grad_y,) = _tokens_first(grad_y)
        *room, spare = _buffers(x, a, 3)
        size = len(spare)
        grad_x, grad_dt, grad_b, grad_c = (torch.empty_like(t) for t in (x, dt, b, c))
        grad_a = torch.zeros_like(a)
        carried = grad_final.clone()
        for index in reversed(range(len(starts))):
            rows = slice(index * size, (index + 1) * size)
            step, bt, gy = dt[rows], b[rows], grad_y[rows]
            decay, states, fed = _piece(x[rows], step, bt, a, starts[index], room)
            grad_c[rows] = (gy.unsqueeze(-2) @ states).squeeze(-2)
            # grad_h[t] = gy_t ⊗ c_t + e^{Δ_{t+1} A} grad_h[t+1]
            grad_h = torch.mul(gy[..., None], c[rows][:, :, None], out=spare[: len(gy)])
            grad_h[-1] += carried
            for t in range(grad_h.shape[0] - 2, -1, -1):
                grad_h[t].addcmul_(decay[t + 1], grad_h[t + 1])
            carried = decay[0] * grad_h[0]
            grad_fed = (grad_h @ bt[..., None]).squeeze(-1)
            grad_b[rows] = (fed.unsqueeze(-2) @ grad_h).squeeze(-2)
            through = decay.mul_(grad_h)
            through[1:].mul_(states[:-1])
            through[0].mul_(starts[index])
            # The last use of grad_h's room.
            grad_dt[rows] = torch.mul(through, a, out=grad_h).sum(-1).addcmul_(grad_fed, x[rows])
            grad_x[rows] = grad_fed.mul_(step)
            grad_a += through.mul_(step[..., None]).sum((0, 1))
        gx, gdt, gb, gc = (g.transpose(0, 1) for g in (grad_x, grad_dt, grad_b, grad_c))
        return gx, gdt, grad_a, gb, gc, carried


def selective_scan_matrix_flops(batch: int, tokens: int, width: int, n: int) -> int:
    """What torch counts for `selective_scan` forward, exactly: the read-out by C."""
    return 2 * batch * tokens * width * n


def selective_step(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor, *,
    each: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrent form for a few tokens; `state` [B, E, N] is updated in place.

    Shapes as `selective_scan`. Returns y [B, K, E] and, when `each`, the states after every token
    [B, K, E, N].
    """
    dtype = state.dtype
    wide_x, step = x.to(dtype), dt.to(dtype)
    b, c = b.to(dtype).unsqueeze(-2), c.to(dtype)[..., None]
    decay = (step[..., None] * a).exp_()
    fed = (step * wide_x)[..., None]
    outputs, states = [], []
    for t in range(x.shape[1]):
        state.mul_(decay[:, t]).addcmul_(fed[:, t], b[:, t])
        outputs.append(state @ c[:, t])
        if each:
            states.append(state.clone())
    y = outputs[0] if x.shape[1] == 1 else torch.cat(outputs, -1)
    y = torch.addcmul(y.transpose(1, 2), wide_x, d.to(dtype))
    return y.to(x.dtype), torch.stack(states, 1) if each else None


def selective_step_matrix_flops(batch: int, tokens: int, width: int, n: int) -> int:
    """What torch counts for `selective_step`, exactly: the read-out by C."""
    return 2 * batch * tokens * width * n


def selective_scan_ref(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle: float64, one token at a time."""
    x, dt, a, b, c, d = (t.double() for t in (x, dt, a, b, c, d))
    h, rows = state.double(), []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * a).exp() * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        rows.append((h * c[:, t, None]).sum(-1) + d * x[:, t])
    return torch.stack(rows, 1), h
