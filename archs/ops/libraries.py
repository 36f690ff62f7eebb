"""Forms by other people's libraries: baselines beside our kernels, never in their place.

They serve single new tokens of full batches, the case that is compared; longer steps are ours.
Layouts are theirs by strides alone wherever their kernels take strides.
"""

from typing import Any, cast

import torch
from torch import Tensor

from archs.backends import NoFormError
from archs.errors import UserError
from archs.state import LayerState, Pages, Slots


def flash_attention(q: Tensor, p: Pages) -> Tensor:
    """flash-attn's decode over pages. q: [B, K, H, d] -> [B, K, H, d]."""
    from flash_attn import flash_attn_with_kvcache

    if p.sinks:
        raise NoFormError(f"sinks={p.sinks}: flash-attn has no sinks; use --backend triton")
    # [G, pages * page_size, d] as the library's [pages, page_size, G, d].
    k, v = (t.unflatten(1, (-1, p.page_size)).permute(1, 2, 0, 3) for t in p.pool.unbind(0))
    window = (-1, -1) if p.window is None else (p.window - 1, 0)
    out = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=p.total, block_table=p.table, causal=True, window_size=window
    )
    return cast(Tensor, out)


def single(x: Tensor, state: LayerState | None, name: str, library: str) -> Slots | None:
    """The slots of a step that a library serves; None where the step is longer, or training.

    Raises UserError where the step asks for what libraries lack.
    """
    if state is None or x.shape[1] > 1:
        return None
    at = state.slots(name)
    if at.new is not None or not at.in_place or state.replayed(name) is not None:
        raise UserError(
            f"{library} serves neither ragged steps nor states for rollback, by copies or by "
            "replay; use --backend triton"
        )
    return at


def mamba2_update(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    at: Slots,
) -> Tensor:  # fmt: skip
    """mamba-ssm's update of Mamba-2's state; shapes as `archs.ops.decay.ssd` with K = 1."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    heads, p = x.shape[2:]
    n = b.shape[-1]
    rate = -a_log.float().exp()
    y = selective_state_update(
        at.pool.transpose(2, 3), x[:, 0], dt[:, 0, :, None].expand(-1, -1, p),
        rate[:, None, None].expand(heads, p, n), b[:, 0], c[:, 0],
        D=d[:, None].expand(heads, p), dt_bias=dt_bias[:, None].expand(heads, p),
        dt_softplus=True, state_batch_indices=at.last,
    )  # fmt: skip
    return cast(Tensor, y)[:, None]


def mamba1_update(
    x: Tensor, z: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor,
    dt_bias: Tensor, at: Slots,
) -> Tensor:  # fmt: skip
    """mamba-ssm's update of Mamba's state; shapes as `archs.ops.selective` with K = 1."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    y = selective_state_update(
        at.pool, x[:, 0], dt[:, 0], -a_log.float().exp(), b[:, 0], c[:, 0], D=d, z=z[:, 0],
        dt_bias=dt_bias, dt_softplus=True, state_batch_indices=at.last,
    )  # fmt: skip
    return cast(Tensor, y)[:, None]


def gated_delta_update(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, at: Slots
) -> Tensor:
    """fla's recurrent gated delta rule; q, k raw, shapes as `archs.ops.gated_delta`, K = 1."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    y, after = fused_recurrent_gated_delta_rule(
        q, k, v, g=log_decay, beta=beta, scale=q.shape[-1] ** -0.5,
        initial_state=_held(at), output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    return _advance(at, y, after)


def decay_update(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float, at: Slots
) -> Tensor:
    """fla's simple gated linear attention; q, k: [B, 1, H, N], v: [B, 1, H, P]."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    decay = log_decay.expand(*v.shape[:3]).contiguous()
    y, after = fused_recurrent_simple_gla(
        q, k, v, g=decay, scale=scale, initial_state=_held(at), output_final_state=True
    )
    return _advance(at, y, after)


def _held(at: Slots) -> Tensor:
    return at.pool[at.read.long()]


def _advance(at: Slots, y: Any, after: Any) -> Tensor:
    """The library returns the new states apart: they go back to their slots."""
    at.pool.index_copy_(0, at.last.long(), cast(Tensor, after).to(at.pool.dtype))
    return cast(Tensor, y)


def repeat_heads(t: Tensor, heads: int) -> Tensor:
    """[B, K, G, N] -> [B, K, H, N] for libraries without shared heads."""
    return t if t.shape[2] == heads else torch.repeat_interleave(t, heads // t.shape[2], 2)
