"""Rows of which a store keeps some: which one goes when another comes (`archs.eviction`).

Tokens are taken one after the other, also those of one step: which rows the next one finds depends
on what this one has looked at. So a split of a sequence into steps changes nothing.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from archs.eviction import OF_ROWS
from archs.spec import Keeping
from archs.state import Kept

#: Planes of what is known of a row: the attention it has had, and its token's position.
ATTENTION, POSITION = 0, 1


class Values(Protocol):
    """What choosing needs of a layer's state; `archs.state.LayerState` says what each is."""

    each: bool

    @property
    def valid(self) -> Tensor | None: ...
    @property
    def past(self) -> Tensor: ...
    def get(self, name: str) -> Tensor: ...
    def put(self, name: str, value: Tensor, each: Tensor | None = None) -> None: ...


class Held(NamedTuple):
    """rows: [B, 2, G, R, d], keys and values; told: float32 [B, 2, G, R], as `ATTENTION` says."""

    rows: Tensor
    told: Tensor


class Choosing(Kept):
    """The kept rows of one tensor in one step, with the new rows [B, K, 2, G, d] to come."""

    def __init__(self, state: Values, name: str, new: Tensor, keeps: Keeping) -> None:
        self._state = state
        self._name = name
        self._new = new
        self._keeps = keeps

    def attend(self, q: Tensor) -> Tensor:
        """As `archs.state.Kept.attend`."""
        state, told = self._state, f"{self._name} {OF_ROWS}"
        held = Held(state.get(self._name), state.get(told))
        tokens, valid = q.shape[1], state.valid
        seen = state.past.long()
        out, after = [], []
        for t in range(tokens):
            real = torch.ones_like(seen, dtype=torch.bool) if valid is None else valid[:, t]
            take(held, self._new[:, t], seen, real, self._keeps)
            out.append(look(held, q[:, t], seen, real, self._keeps))
            seen = seen + real
            if state.each:
                after.append(Held(held.rows.clone(), held.told.clone()))
        each: list[Tensor | None] = [None, None]
        if after:
            each = [torch.stack(values, 1) for values in zip(*after, strict=True)]
        state.put(self._name, held.rows, each[0])
        state.put(told, held.told, each[1])
        return torch.stack(out, 1)


def take(held: Held, new: Tensor, seen: Tensor, real: Tensor, keeps: Keeping) -> None:
    """Put a token's row where there is room, else where the row lies that has had the least
    attention, the `newest` apart; in place.

    new: [B, 2, G, d]. seen: int64 [B], tokens before this one. real: bool [B], whether it is one.
    """
    attention, position = held.told.unbind(1)
    old = position <= (seen - keeps.newest)[:, None, None]
    least = attention.masked_fill(~old, math.inf).argmin(-1)
    full = (seen >= keeps.rows)[:, None]
    at = torch.where(full, least, seen[:, None].clamp(max=keeps.rows - 1))
    batch = torch.arange(len(at), device=at.device)[:, None]
    heads = torch.arange(at.shape[1], device=at.device)
    place = batch, slice(None), heads, at
    given = torch.where(real[:, None, None, None], new.transpose(1, 2), held.rows[place])
    held.rows[place] = given
    fresh = torch.stack((torch.zeros_like(at), seen[:, None].expand_as(at)), -1)
    held.told[place] = torch.where(real[:, None, None], fresh.to(held.told.dtype), held.told[place])


def look(held: Held, q: Tensor, seen: Tensor, real: Tensor, keeps: Keeping) -> Tensor:
    """Attention of a token over the kept rows, its own among them, which each KV head's rows are
    told of in place. q: [B, H, d] -> [B, H, d].
    """
    k, v = held.rows.unbind(1)
    grouped = q.unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
    there = torch.arange(keeps.rows, device=q.device) <= seen[:, None]
    scores = (grouped @ k.mT).masked_fill(~there[:, None, None], -math.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    asked = weights.sum(2, dtype=held.told.dtype)
    attention = held.told[:, ATTENTION]
    attention.copy_(torch.where(real[:, None, None], keeps.fade * attention + asked, attention))
    return (weights.to(v.dtype) @ v).flatten(1, 2)
