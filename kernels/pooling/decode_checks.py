"""What `pooled_decode` asks of its arguments, before any launch."""

import torch
from torch import Tensor

from kernels.checks import form, require
from kernels.device import interpreted, require_gpu

#: Every token reads its rows anew: a longer step has better forms.
MAX_TOKENS = 9
#: Channels of a row: each width was compiled for every target.
WIDTHS = (32, 64, 96, 128, 256, 512)


def check(
    q: Tensor, near: Tensor, near_table: Tensor, lengths: Tensor, far: Tensor, far_table: Tensor,
    past: Tensor, sinks: Tensor, cos_sin: Tensor, page_size: int, window: int, every: int,
    picks: Tensor | None, out: Tensor | None, *, kernel: object,
) -> None:  # fmt: skip
    """Every rule of `pooled_decode`.

    kernel: in the interpreter it takes tensors on a CPU and float32, too.
    """
    require_gpu("q", q, kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, K, H, d]")
    batch, tokens, heads, dim = q.shape
    dtypes = (torch.bfloat16, torch.float16) + ((torch.float32,) if interpreted(kernel) else ())
    require(q.dtype in dtypes, "q", form(q), "must be bfloat16 or float16")
    require(dim in WIDTHS, "d", dim, "must be one of {}; use backend torch", WIDTHS)
    require(1 <= tokens <= MAX_TOKENS, "K", tokens, "new tokens must be 1 to {}", MAX_TOKENS)
    require(heads >= 1, "q", form(q), "must have at least one head")
    strides = [q.stride(i) for i in range(3) if q.shape[i] > 1]
    aligned = q.stride(3) == 1 and not any(s % 16 for s in strides)
    require(aligned and q.data_ptr() % 16 == 0, "q", form(q),
            "must start at 16 bytes and have strides [16i, 16j, 16k, 1]")  # fmt: skip

    require(page_size >= 16 and page_size % 16 == 0, "page_size", page_size,
            "must be a positive multiple of 16")  # fmt: skip
    require(window >= 1, "window", window, "must be at least 1")
    require(every >= 1, "every", every, "must be at least 1")
    for name, pool in (("near", near), ("far", far)):
        fits = pool.dim() == 2 and pool.shape[1] == dim and pool.shape[0] % page_size == 0
        fits = fits and pool.dtype == q.dtype and pool.is_contiguous()
        require(fits and pool.data_ptr() % 16 == 0, name, form(pool),
                "must be contiguous {} [pages * {}, {}], from 16 bytes on",
                q.dtype, page_size, dim)  # fmt: skip
    for name, table in (("near_table", near_table), ("far_table", far_table)):
        fits = table.dim() == 2 and table.shape[0] == batch and table.shape[1] > 0
        require(fits and table.dtype == torch.int32 and table.is_contiguous(), name, form(table),
                "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
    for name, counts in (("lengths", lengths), ("past", past)):
        fits = counts.shape == (batch,) and counts.dtype == torch.int32 and counts.is_contiguous()
        require(fits, name, form(counts), "must be contiguous int32 [{}]", batch)
    fits = sinks.shape == (heads,) and sinks.dtype in (torch.float32, q.dtype)
    require(fits and sinks.is_contiguous(), "sinks", form(sinks),
            "must be contiguous float32 or {} [{}]", q.dtype, heads)  # fmt: skip
    fits = cos_sin.dim() == 3 and cos_sin.shape[2] == 2 and 1 <= cos_sin.shape[1] <= dim // 2
    fits = fits and cos_sin.dtype == torch.float32 and cos_sin.is_contiguous()
    require(fits, "cos_sin", form(cos_sin),
            "must be contiguous float32 [positions, 1 to {}, 2]", dim // 2)  # fmt: skip

    others = {
        "near": near, "near_table": near_table, "lengths": lengths, "far": far,
        "far_table": far_table, "past": past, "sinks": sinks, "cos_sin": cos_sin,
    }  # fmt: skip
    if picks is not None:
        others["picks"] = picks
        fits = picks.dim() == 3 and picks.shape[:2] == (batch, tokens) and picks.shape[2] > 0
        require(fits and picks.dtype == torch.int64 and picks.is_contiguous(), "picks",
                form(picks), "must be contiguous int64 [{}, {}, picks]", batch, tokens)  # fmt: skip
    if out is not None:
        others["out"] = out
        fits = out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
        require(fits and out.data_ptr() % 16 == 0, "out", form(out),
                "must be contiguous {} {}, from 16 bytes on", q.dtype, list(q.shape))  # fmt: skip
    for name, tensor in others.items():
        require(tensor.device == q.device, name, tensor.device,
                "must be on the device of q, {}", q.device)  # fmt: skip
