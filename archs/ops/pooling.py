"""Rows that pool groups of tokens, and attention over them beside a window and sinks, by backend.

With kernels one launch makes all that a short step has beside products, up to attention, and one
attends over both kinds of rows where they lie.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import Forms
from archs.ops.attention import DECODE_LIMIT
from archs.ops.sparse import Picked, rows_at
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState, PagedSeen, Rows, Seen, mask_of, pages_of
from kernels.attention.torch import latent_attention
from kernels.norm.torch import l2_norm, rms_norm
from kernels.pooling.torch import group_parts, series_of, step_parts
from kernels.rope.torch import earlier, rotate_last, turned_back

#: What a sink adds to the width of rows. One channel would do; fused kernels want multiples of 8.
SINK_CHANNELS = 8


@dataclass(frozen=True, slots=True)
class Pooling:
    """How groups of `size` tokens become rows: pooled, normed, their last `rope_dim` channels
    turned to the position of the group's first token.
    """

    size: int
    rope_dim: int
    theta: float
    eps: float


class Own(NamedTuple):
    """A row of each token, and queries that are normed.

    row: [B, K, d]; weight: [d], of its norm; rows: the row tensor that takes it. q_eps: added to
    the squared length of each query head, by which it is divided.
    """

    row: Tensor
    weight: Tensor
    rows: str
    q_eps: float


class Grouped(NamedTuple):
    """What pooled rows are made of, and where they go.

    values, gates: [B, K, S·d] as projected; bias: [size, S·d], added to the gates of a group's
    tokens in their order; weight: [d], of the rows' norm. rows: the row tensor, [d]; part: the
    fixed tensor, [2, S, d], that takes what is begun (`kernels.pooling.torch`).
    """

    values: Tensor
    gates: Tensor
    bias: Tensor
    weight: Tensor
    rows: str
    part: str


def append_tokens(
    q: Tensor, own: Own, grouped: Grouped, state: LayerState, how: Pooling, *, backend: str
) -> tuple[Tensor, Rows, Rows]:
    """Norm and turn queries, store the rows of new tokens and those that they complete.

    q: [B, K, H, d], whose memory may be written. Returns the queries, and the rows of both kinds
    that the new tokens may see. Raises NoFormError where the backend has no form, as all operations
    here do.
    """
    q, far = _APPEND[backend](q, own, grouped, state, how)
    return q, state.seen(own.rows), far


def append_index(
    q: Tensor, grouped: Grouped, state: LayerState, how: Pooling, *, backend: str
) -> tuple[Tensor, Rows]:
    """The same of an indexer, whose queries are turned alone and whose keys are all pooled."""
    return _APPEND[backend](q, None, grouped, state, how)


def attend_pooled(
    q: Tensor, near: Rows, far: Rows, sinks: Tensor, state: LayerState, how: Pooling, *,
    scale: float, backend: str,
) -> Tensor:  # fmt: skip
    """Attention over the rows of both, which are keys and values, and a sink for each head; what
    is found is turned back by its token's position, as rows are turned by theirs.

    q: [B, K, H, d]; rows: [d]; sinks: [H], logits of a row of zeros. Returns [B, K, H, d];
    2·B·K·H·S·2·(d + SINK_CHANNELS) FLOPs are counted, over S rows of both and the sink.
    """
    return _ATTEND[backend](q, near, far, sinks, state, how, scale)


def attend_all_pooled(
    q: Tensor, near: Seen, far: Seen, sinks: Tensor, angles: Tensor, *, scale: float
) -> Tensor:
    """The same of whole sequences, differentiable, torch's under every backend.

    angles: of their positions, [T, 1, rope_dim / 2].
    """
    return rotate_last(_attended(q, near, far, sinks, scale), turned_back(angles))


def attend_picked_rows(
    q: Tensor, near: Rows, far: Rows, picked: Picked, sinks: Tensor, state: LayerState,
    how: Pooling, *, scale: float, backend: str,
) -> Tensor:  # fmt: skip
    """As `attend_pooled`, of every token over the rows of `far` that it picked, which are all that
    is read of them.
    """
    return _ATTEND_PICKED[backend](q, near, far, picked, sinks, state, how, scale)


def _append(
    q: Tensor, own: Own | None, grouped: Grouped, state: LayerState, how: Pooling
) -> tuple[Tensor, Rows]:
    angles = state.rope(how.rope_dim, how.theta)
    if own is not None:
        q = l2_norm(q, own.q_eps)
        row = rms_norm(own.row, own.weight, how.eps)
        state.append(own.rows, rotate_last(row[:, :, None], angles)[:, :, 0])
    return rotate_last(q, angles), _append_pooled(grouped, state, how, angles)


def _append_pooled(grouped: Grouped, state: LayerState, how: Pooling, angles: Tensor) -> Rows:
    size, (batch, count) = how.size, grouped.values.shape[:2]
    past, held, each = state.past.long(), state.get(grouped.part), None
    at, series = state.positions, held.shape[2]
    values, gates = series_of(grouped.values, grouped.gates, grouped.bias, at, series)
    # The last token of each row, or any where a row is none of a sequence's own.
    ends = torch.arange(1, -(-count // size) + 1, device=past.device) * size - 1
    ends = (ends - past[:, None] % size).clamp(max=count - 1)
    of = torch.arange(batch, device=past.device)[:, None]
    if count <= RECURRENT_LIMIT:
        each = step_parts(held, values, gates, at.expand(batch, -1), state.valid, size)
        after, whole = each[:, -1], each[of, ends]
    else:
        parts, after = group_parts(held, values, gates, past, state.new, size)
        whole = parts[:, :-1]
    state.put(grouped.part, after, each if state.each else None)
    means = rms_norm(whole[:, :, 1, 0].to(grouped.weight.dtype), grouped.weight, how.eps)
    angles = earlier(angles.expand(batch, *angles.shape[1:])[of, ends], size - 1, how.theta)
    return state.append(grouped.rows, rotate_last(means[:, :, None], angles)[:, :, 0])


def _append_triton(
    q: Tensor, own: Own | None, grouped: Grouped, state: LayerState, how: Pooling
) -> tuple[Tensor, Rows]:
    """Decode; longer steps, and rows that no kernel may write, are torch's."""
    near = None if own is None else state.pages(own.rows, q.dtype)
    far = state.pages(grouped.rows, q.dtype)
    if q.shape[1] > RECURRENT_LIMIT or far is None or (near is None) != (own is None):
        return _append(q, own, grouped, state, how)
    from kernels.pooling.append import pooled_append
    from kernels.pooling.append_checks import Target

    of_tokens: dict[str, Any] = {}
    if own is not None and near is not None:
        rows = Target(own.weight, near.pool, near.table, near.page_size)
        of_tokens = {"row": own.row, "rows": rows, "q_eps": own.q_eps}
    part = state.slots(grouped.part)
    pooled_append(
        q, grouped.values, grouped.gates, grouped.bias, part.pool,
        Target(grouped.weight, far.pool, far.table, far.page_size),
        state.rotary(how.rope_dim, how.theta), state.past, read=part.read, write=part.write,
        every=how.size, eps=how.eps, each=part.each, new=part.new, **of_tokens,
    )  # fmt: skip
    if own is not None:
        state.written(own.rows)
    return q, state.written(grouped.rows)


def _attended(q: Tensor, near: Rows, far: Rows, sinks: Tensor, scale: float) -> Tensor:
    """A sink is one row more: zeros, but for a channel in which queries have its logit."""
    batch, new, heads, dim = q.shape
    rows = F.pad(torch.cat((near.rows, far.rows), 1), (0, SINK_CHANNELS, 0, 1))
    rows[:, -1, dim] = 1 / scale
    logits = sinks.to(q.dtype).expand(batch, new, heads)[..., None]
    asked = F.pad(torch.cat((q, logits), -1), (0, SINK_CHANNELS - 1))
    masks = [mask_of(seen, new).expand(batch, -1, -1) for seen in (near, far)]
    mask = F.pad(torch.cat(masks, -1), (0, 1), value=True)
    return latent_attention(asked, rows[:, None], v_dim=dim, scale=scale, mask=mask[:, None])


def _attend(
    q: Tensor, near: Rows, far: Rows, sinks: Tensor, state: LayerState, how: Pooling, scale: float
) -> Tensor:
    found = _attended(q, near, far, sinks, scale)
    return rotate_last(found, turned_back(state.rope(how.rope_dim, how.theta)))


def _attend_picked(
    q: Tensor, near: Rows, far: Rows, picked: Picked, sinks: Tensor, state: LayerState,
    how: Pooling, scale: float,
) -> Tensor:  # fmt: skip
    """Each token is a sequence of its own, with the window's rows once more."""
    batch, new = q.shape[:2]
    window = near.rows[:, None].expand(-1, new, -1, -1).flatten(0, 1)
    mask = mask_of(near, new).expand(batch, -1, -1).flatten(0, 1)
    own, valid = rows_at(far, picked.at).flatten(0, 1), picked.valid.flatten(0, 1)
    found = _attended(
        q.flatten(0, 1)[:, None], Seen(window, mask[:, None, None], False),
        Seen(own, valid[:, None, None], False), sinks, scale,
    )  # fmt: skip
    return rotate_last(found.view_as(q), turned_back(state.rope(how.rope_dim, how.theta)))


def _attend_triton(
    q: Tensor, near: Rows, far: Rows, sinks: Tensor, state: LayerState, how: Pooling, scale: float
) -> Tensor:
    found = _attend_pages(q, near, far, None, sinks, state, how, scale)
    return _attend(q, near, far, sinks, state, how, scale) if found is None else found


def _attend_picked_triton(
    q: Tensor, near: Rows, far: Rows, picked: Picked, sinks: Tensor, state: LayerState,
    how: Pooling, scale: float,
) -> Tensor:  # fmt: skip
    # Where a token sees fewer rows it picks them all, and they come before all others.
    found = _attend_pages(q, near, far, picked.at, sinks, state, how, scale)
    if found is None:
        return _attend_picked(q, near, far, picked, sinks, state, how, scale)
    return found


def _attend_pages(
    q: Tensor, near: Rows, far: Rows, picks: Tensor | None, sinks: Tensor, state: LayerState,
    how: Pooling, scale: float,
) -> Tensor | None:  # fmt: skip
    """By the kernel of short steps; None where one is long or rows do not lie in pages of one size,
    as those of a window that a step has joined with its own may not.
    """
    own = pages_of(near)
    if own is None or own.window is None or not isinstance(far, PagedSeen):
        return None
    if q.shape[1] > DECODE_LIMIT or own.page_size != far.pages.page_size:
        return None
    from kernels.pooling.decode import pooled_decode

    return pooled_decode(
        q, own.pool, own.table, own.total, far.pages.pool, far.pages.table, state.past, sinks,
        state.rotary(how.rope_dim, how.theta), scale=scale, page_size=own.page_size,
        window=own.window, every=how.size, picks=picks,
    )  # fmt: skip


_APPEND = Forms("gated pooling", {"torch": _append, "triton": _append_triton, "sdpa": _append})
_ATTEND = Forms(
    "attention over pooled rows", {"torch": _attend, "triton": _attend_triton, "sdpa": _attend}
)
_ATTEND_PICKED = Forms(
    "attention over picked pooled rows",
    {"torch": _attend_picked, "triton": _attend_picked_triton, "sdpa": _attend_picked},
)
