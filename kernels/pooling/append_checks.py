"""What `pooled_append` asks of its arguments, before any launch."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.pages.write import FLOATS
from kernels.recurrent.step import require_slots, require_state, row_stride

MAX_DIM = 512


class Target(NamedTuple):
    """Where rows go, and the norm before them.

    weight: [d], contiguous, a float dtype. pool: contiguous [pages * page_size, d], a float dtype.
    page_table: int32 [B, max_pages]; entry j is the pool page of rows j * page_size and up.
    """

    weight: Tensor
    pool: Tensor
    page_table: Tensor
    page_size: int

    def check(self, name: str, batch: int, dim: int, device: torch.device) -> None:
        """Raise ValueError naming what of it breaks which rule."""
        size = self.page_size
        require(size >= 1, f"{name}.page_size", size, "must be at least 1")
        t = self.weight
        fits = t.shape == (dim,) and t.dtype in FLOATS and t.is_contiguous()
        require(fits, f"{name}.weight", form(t), "must be contiguous float [{}]", dim)
        t = self.pool
        fits = t.dim() == 2 and t.shape[1] == dim and t.shape[0] % size == 0
        fits = fits and t.dtype in FLOATS and t.is_contiguous()
        require(fits, f"{name}.pool", form(t),
                "must be contiguous float [pages * {}, {}]", size, dim)  # fmt: skip
        t = self.page_table
        fits = t.dim() == 2 and t.shape[0] == batch and t.shape[1] > 0
        fits = fits and t.dtype == torch.int32 and t.is_contiguous()
        require(fits, f"{name}.page_table", form(t),
                "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
        for field in ("weight", "pool", "page_table"):
            where = getattr(self, field).device
            require(where == device, f"{name}.{field}", where,
                    "must be on the device of part, {}", device)  # fmt: skip


def check(
    q: Tensor, values: Tensor, gates: Tensor, bias: Tensor, part: Tensor, pooled: Target,
    cos_sin: Tensor, lengths: Tensor, read: Tensor, write: Tensor, every: int, eps: float,
    q_eps: float | None, row: Tensor | None, rows: Target | None, new: Tensor | None, *,
    kernel: object,
) -> tuple[int, int, int, int]:  # fmt: skip
    """Every rule of `pooled_append`; in the interpreter `kernel` takes tensors on a CPU.

    Returns how far apart tokens lie: of q, values, gates and row.
    """
    require(q.dim() == 4, "q", form(q), "must be [B, K, H, d]")
    batch, tokens, heads, dim = q.shape
    require(heads >= 1, "q", form(q), "must have heads")
    require(2 <= dim <= MAX_DIM, "d", dim, "must be 2 to {}", MAX_DIM)
    fits = part.dim() == 4 and part.shape[2] in (1, 2) and part.dtype == torch.float32
    require(fits, "part", form(part), "must be float32 [slots, 2, S, {}], S 1 or 2", dim)
    wide, device = part.shape[2] * dim, part.device
    require_state(kernel, part, read, write, new, (batch, tokens, *part.shape[1:3], dim), "part")
    require_slots(part, (batch,), lengths=lengths)
    require_gpu("q", q, kernel)
    require(q.dtype in FLOATS, "q", form(q), "must be bfloat16, float16 or float32")
    apart = {"q": row_stride("q", q), "row": 0}
    require(apart["q"] >= heads * dim or batch * tokens == 1, "q", form(q), "must not overlap")
    require((row is None) == (rows is None), "row", row if row is None else form(row),
            "must be given exactly where rows are")  # fmt: skip
    require(every >= 1, "every", every, "must be at least 1")
    require(eps >= 0, "eps", eps, "must be at least 0")
    require(q_eps is None or q_eps >= 0, "q_eps", q_eps, "must be at least 0")
    projected = {"values": (values, wide), "gates": (gates, wide)}
    if row is not None:
        projected["row"] = row, dim
    for name, (given, width) in projected.items():
        fits = given.shape == (batch, tokens, width) and given.dtype == q.dtype
        require(fits, name, form(given), "must be {} {}", q.dtype, [batch, tokens, width])
        apart[name] = row_stride(name, given)
    fits = bias.shape == (every, wide) and bias.dtype in FLOATS and bias.is_contiguous()
    require(fits, "bias", form(bias), "must be contiguous float {}", [every, wide])
    fits = cos_sin.dim() == 3 and cos_sin.shape[2] == 2 and 2 <= 2 * cos_sin.shape[1] <= dim
    fits = fits and cos_sin.dtype == torch.float32 and cos_sin.is_contiguous()
    require(fits, "cos_sin", form(cos_sin),
            "must be contiguous float32 [positions, r / 2, 2], r at most {}", dim)  # fmt: skip
    others = {"q": q, "values": values, "gates": gates, "row": row, "bias": bias}
    for name, tensor in (others | {"cos_sin": cos_sin}).items():
        here = tensor is None or tensor.device == device
        require(here, name, None if tensor is None else tensor.device,
                "must be on the device of part, {}", device)  # fmt: skip
    pooled.check("pooled", batch, dim, device)
    if rows is not None:
        rows.check("rows", batch, dim, device)
    return apart["q"], apart["values"], apart["gates"], apart["row"]
