"""Gradients of `chunk`: states are recomputed, then the passes run both ways in time.

The gradient of the running sums is exact where it cancels: what a chunk's tokens do to each other
enters as row minus column sums of one float32 matrix, what they leave to later chunks as the sum
of the very terms that make up the change (legend: `chunk_passes`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decay.chunk_passes import CONFIGS, carry, contributions, empty, rows, sums
from kernels.recurrent.scan import ScanSizes


@triton.jit
def decay_chunk_bwd_decay_kernel(  # type: ignore[no-untyped-def]
    change, left, kept, new, out, tokens, chunks,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H, B): from the gradient of the running sums to that of g.

    g_t acts on the sums from t on, on what tokens before t leave behind, and on the old state:
    Σ_{u >= t} change_u + Σ_{u < t} left_u + kept. `change`, `left`: TILES parts; `kept`: BLOCKS.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    heads, batch = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    lanes = heads * tl.num_programs(2)
    place = (batch * heads + head) * chunks + chunk
    c = tl.arange(0, CHUNK)
    moved = tl.zeros([CHUNK], tl.float32)
    stays = tl.zeros([CHUNK], tl.float32)
    for tile in range(TILES):
        at = (tile * lanes.to(tl.int64) * chunks + place) * CHUNK + c
        moved += tl.load(change + at)
        stays += tl.load(left + at)
    block = tl.arange(0, BLOCKS_UP)
    parts = kept + block * lanes.to(tl.int64) * chunks + place
    old = tl.sum(tl.load(parts, mask=block < BLOCKS, other=0.0), 0)
    grad = tl.cumsum(moved, 0, reverse=True) + (tl.cumsum(stays, 0) - stays) + old
    t = chunk * CHUNK + c
    if new is not None:
        grad = tl.where(t < tl.load(new + batch), grad, 0.0)
    tl.store(out + (batch * tokens + t) * heads + head, grad, mask=t < tokens)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, new: Tensor | None,
    dy: Tensor | None, dlast: Tensor | None, decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, k, v, log_decay (None unless `decay`) and the first state.

    dy: [B, T, H, P] and dlast: float32 [B, H, N, P], None where nothing comes from y or from the
    last state; the rest is as `chunk` has it.
    """
    s = ScanSizes.of(q, v, CONFIGS[q.dtype].chunk)
    dy = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    total = sums(s, q)
    states = contributions(s, k, v, log_decay, new, total)
    carry(s, state, states, total)
    later = contributions(s, q, dy, log_decay, new, total, reverse=True)
    before = states if decay else None
    dstate, kept = carry(s, dlast, later, total, reverse=True, states=before)
    # Heads of one group are summed in float32.
    wide = q.dtype if s.share == 1 else torch.float32
    w = q if decay else None
    dq, change = rows(s, dy, v, k, states, total, new, wide, transpose=True, w=w)
    dq = s.sum_heads(dq, q.dtype)
    w = k if decay else None
    dk, left = rows(s, v, dy, q, later, total, new, wide, reverse=True, transpose=True, w=w)
    dk = s.sum_heads(dk, k.dtype)
    dv, _ = rows(s, k, q, dy, later, total, new, v.dtype, reverse=True)
    if change is None or left is None or kept is None:
        return dq, dk, dv, None, dstate
    dg = empty(q, s.batch, s.tokens, s.heads)
    decay_chunk_bwd_decay_kernel[(s.chunks, s.heads, s.batch)](
        change, left, kept, new, dg, s.tokens, s.chunks,
        TILES=change.shape[0], BLOCKS=kept.shape[0],
        BLOCKS_UP=triton.next_power_of_2(kept.shape[0]), CHUNK=s.chunk, num_warps=1,
    )  # fmt: skip
    return dq, dk, dv, dg.sum_to_size(log_decay.shape), dstate
