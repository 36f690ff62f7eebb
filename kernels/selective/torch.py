"""Mamba's selective scan (S6, arXiv 2312.00752, eq. 2): h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t,
y_t = C_t · h_t + D x_t.

On a CPU the recurrence itself is one fused multiply-add per token over [B, N, E]; what costs is
memory. So it runs in short pieces whose decays, inputs and states stay in cache, and backward
computes each piece again from the state at its start. Inside, tensors are token first and dense:
of a transposed view every result would be one, too, and products would copy it whole. States are
[N, E] there, since the read-out C · h is several times faster along rows of E than along N = 16
numbers. Δ, A and states are float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Floats of one [piece, B, N, E] buffer: three of them should stay in cache.
PIECE_FLOATS = 1 << 19
#: Tokens that a piece should have: the state before each piece is kept for backward, and a state
#: takes as much as what is computed of one token. Sequences are run in groups that leave so many.
PIECE_TOKENS = 16


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
    if torch.is_grad_enabled() and any(t.requires_grad for t in (wx, wdt, wa, wb, wc, start)):
        y, final = _SelectiveScan.apply(wx, wdt, wa, wb, wc, start)
    else:
        y, final, _ = _scan(wx, wdt, wa, wb, wc, start, keep=False)
    return torch.addcmul(y, wx, d.to(wide)).to(x.dtype), final


def _tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, ·] as dense [T, B, ·]."""
    return tuple(t.transpose(0, 1).contiguous() for t in tensors)


def _layout(x: Tensor, a: Tensor) -> tuple[int, int]:
    """How many sequences share pieces, and tokens of a piece (of a state too wide for cache,
    enough that few starts are kept).
    """
    batch, tokens, _ = x.shape
    group = min(max(1, PIECE_FLOATS // (PIECE_TOKENS * a.numel())), batch)
    return group, min(max(4, PIECE_FLOATS // (group * a.numel())), tokens)


def _buffers(x: Tensor, a: Tensor, count: int) -> tuple[Tensor, ...]:
    """Room for `count` tensors [piece, B, N, E], once for all pieces: new memory costs more to
    get than to fill.
    """
    group, size = _layout(x, a)
    return x.new_empty(count, size, group, *a.mT.shape).unbind()


def _piece(
    x: Tensor, dt: Tensor, b: Tensor, a: Tensor, start: Tensor, room: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Decays and states of one piece, [t, B, N, E] each and in `room`, and its Δ·x [t, B, E]; a is
    [N, E] here.
    """
    decay, states = (buffer[: len(x), : x.shape[1]] for buffer in room)
    fed = dt * x
    torch.mul(dt.unsqueeze(-2), a, out=decay).exp_()
    torch.mul(fed.unsqueeze(-2), b[..., None], out=states)
    for state, kept in zip(states.unbind(), decay.unbind(), strict=True):
        start = state.addcmul_(kept, start)
    return decay, states, fed


def _scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [B, T, E] without D x, the final state [B, E, N], and, to `keep`, the states before each
    piece [piece, B, N, E].
    """
    room = _buffers(x, a, 2)
    group, size = _layout(x, a)
    a, start = a.mT.contiguous(), start.mT.contiguous()
    y, final = torch.empty_like(x), torch.empty_like(start)
    pieces = -(-x.shape[1] // size)
    starts = start.new_empty(pieces, *start.shape) if keep else None
    for low in range(0, len(x), group):
        seqs = slice(low, low + group)
        gx, gdt, gb, gc = _tokens_first(x[seqs], dt[seqs], b[seqs], c[seqs])
        state = start[seqs]
        for i in range(pieces):
            rows = slice(i * size, (i + 1) * size)
            if starts is not None:
                starts[i, seqs] = state
            _, states, _ = _piece(gx[rows], gdt[rows], gb[rows], a, state, room)
            out = (gc[rows].unsqueeze(-2) @ states).squeeze(-2)
            y[seqs, rows] = out.transpose(0, 1)
            state = states[-1].clone()
        final[seqs] = state
    return y, final.mT.contiguous(), starts


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, final, starts = _scan(x, dt, a, b, c, start, keep=True)
        ctx.save_for_backward(x, dt, a, b, c, starts)
        return y, final

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_final: Tensor) -> tuple[Tensor, ...]:
        x, dt, a, b, c, starts = ctx.saved_tensors
        room = _buffers(x, a, 3)
        group, size = _layout(x, a)
        a = a.mT.contiguous()
        grads = tuple(torch.empty_like(t) for t in (x, dt, b, c))
        grad_a = torch.zeros_like(a)
        grad_start = grad_final.mT.clone(memory_format=torch.contiguous_format)
        for low in range(0, len(x), group):
            seqs = slice(low, low + group)
            inputs = _tokens_first(x[seqs], dt[seqs], b[seqs], c[seqs], grad_y[seqs])
            carried = grad_start[seqs]
            for i in reversed(range(len(starts))):
                rows = slice(i * size, (i + 1) * size)
                piece = [t[rows] for t in inputs]
                *found, into_a, carried = _piece_backward(piece, a, starts[i, seqs], carried, room)
                grad_a += into_a
                for grad, part in zip(grads, found, strict=True):
                    grad[seqs, rows] = part.transpose(0, 1)
            grad_start[seqs] = carried
        grad_x, grad_dt, grad_b, grad_c = grads
        return grad_x, grad_dt, grad_a.mT, grad_b, grad_c, grad_start.mT


def _piece_backward(
    inputs: Sequence[Tensor], a: Tensor, start: Tensor, carried: Tensor, room: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of one piece's x, Δ, B, C and of A, and that of the state before it, from those of
    its y (the last of the inputs) and of the state after it (`carried`).
    """
    x, dt, b, c, gy = inputs
    *room, spare = room
    decay, states, fed = _piece(x, dt, b, a, start, room)
    # Products with a transposed view: of rows of E they take a tenth of the time.
    grad_c = (gy.unsqueeze(-2) @ states.mT).squeeze(-2)
    # grad_h[t] = gy_t ⊗ c_t + e^{Δ_{t+1} A} grad_h[t+1]
    grad_h = torch.mul(gy.unsqueeze(-2), c[..., None], out=spare[: len(x), : x.shape[1]])
    grad_h[-1] += carried
    later, kept = grad_h.unbind(), decay.unbind()
    for t in range(len(later) - 2, -1, -1):
        later[t].addcmul_(kept[t + 1], later[t + 1])
    carried = kept[0] * later[0]
    grad_fed = (b.unsqueeze(-2) @ grad_h).squeeze(-2)
    grad_b = (fed.unsqueeze(-2) @ grad_h.mT).squeeze(-2)
    through = decay.mul_(grad_h)
    through[1:].mul_(states[:-1])
    through[0].mul_(start)
    # The last use of grad_h's room.
    grad_dt = torch.mul(through, a, out=grad_h).sum(-2).addcmul_(grad_fed, x)
    grad_a = through.mul_(dt.unsqueeze(-2)).sum((0, 1))
    return grad_fed * dt, grad_dt, grad_b, grad_c, grad_a, carried


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
