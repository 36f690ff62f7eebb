"""What `attention_prefill` asks of its arguments, before any launch."""

import math

import torch
from torch import Tensor

from kernels.checks import form, require
from kernels.device import interpreted, require_gpu

#: Head dims of keys and values: equal ones, and latent attention's expanded forms, whose keys
#: carry rotary channels, too.
DIMS = ((32, 32), (48, 32), (64, 64), (96, 64), (128, 128), (192, 128), (256, 256))


def check(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor,
    page_size: int, scale: float | None, window: int | None, sinks: int,
    new: Tensor | None, sink_logits: Tensor | None, out: Tensor | None, *, kernel: object,
) -> tuple[int, int, int, int, int, int]:  # fmt: skip
    """Every rule of `attention_prefill`; returns B, K, H, d, dv, G.

    kernel: in the interpreter it takes tensors on a CPU and float32, too.
    """
    require_gpu("q", q, kernel)
    require(q.dim() == 4 and q.shape[1] > 0 and q.shape[2] > 0, "q", form(q),
            "must be [B, K >= 1, H, d]")  # fmt: skip
    batch, tokens, heads, dim = q.shape
    dtypes = (torch.bfloat16, torch.float16) + ((torch.float32,) if interpreted(kernel) else ())
    require(q.dtype in dtypes, "q", form(q), "must be bfloat16 or float16")
    strides = [q.stride(i) for i in range(3) if q.shape[i] > 1]
    aligned = q.stride(3) == 1 and not any(s % 16 for s in strides) and q.data_ptr() % 16 == 0
    require(aligned, "q", form(q), "must start at 16 bytes and have strides [16i, 16j, 16k, 1]")

    require(page_size >= 16 and page_size % 16 == 0, "page_size", page_size,
            "must be a positive multiple of 16")  # fmt: skip
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        shape = form(pool)
        fits = pool.dim() == 3 and pool.shape[0] > 0 and pool.shape[1] % page_size == 0
        fits = fits and pool.shape[1] < 2**31
        require(fits, name, shape, "must be [G, pages * {} < 2^31, head_dim]", page_size)
        width = pool.shape[2]
        require(heads % pool.shape[0] == 0, name, shape,
                "must have heads that divide the {} of q", heads)  # fmt: skip
        require(pool.dtype == q.dtype, name, shape, "must be {}, as q is", q.dtype)
        aligned = pool.stride()[1:] == (width, 1) and (
            pool.shape[0] == 1 or pool.stride(0) % 16 == 0
        )
        require(aligned and pool.data_ptr() % 16 == 0, name, shape,
                "must start at 16 bytes and have strides [16i, {}, 1]", width)  # fmt: skip
    require(k_pool.shape[2] == dim, "k_pool", form(k_pool), "must have q's head_dim, {}", dim)
    dims = dim, v_pool.shape[2]
    require(dims in DIMS, "(d, dv)", dims, "must be one of {}; use backend torch", DIMS)
    require(v_pool.shape[:2] == k_pool.shape[:2], "v_pool", form(v_pool),
            "must have k_pool's heads and rows, {}", list(k_pool.shape[:2]))  # fmt: skip

    require(scale is None or 0 < scale < math.inf, "scale", scale, "must be positive and finite")
    require(window is None or window >= 1, "window", window, "must be None or at least 1")
    require(sinks >= 0, "sinks", sinks, "must be at least 0")
    table = page_table.dim() == 2 and page_table.shape[0] == batch and page_table.shape[1] > 0
    table = table and page_table.dtype == torch.int32 and page_table.is_contiguous()
    require(table, "page_table", form(page_table),
            "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
    for name, vector in (("lengths", lengths), ("new", new)):
        if vector is not None:
            fits = vector.shape == (batch,) and vector.dtype == torch.int32
            require(fits and vector.is_contiguous(), name, form(vector),
                    "must be contiguous int32 [{}]", batch)  # fmt: skip
    if sink_logits is not None:
        fits = sink_logits.shape == (heads,) and sink_logits.dtype == q.dtype
        require(fits and sink_logits.is_contiguous(), "sink_logits", form(sink_logits),
                "must be contiguous {} [{}]", q.dtype, heads)  # fmt: skip
    if out is not None:
        sizes = (batch, tokens, heads, v_pool.shape[2])
        fits = out.shape == sizes and out.dtype == q.dtype and out.is_contiguous()
        require(fits and out.data_ptr() % 16 == 0, "out", form(out),
                "must be contiguous {} {}, from 16 bytes on", q.dtype, list(sizes))  # fmt: skip
    others = {"k_pool": k_pool, "v_pool": v_pool, "page_table": page_table, "lengths": lengths}
    given = ("new", new), ("sink_logits", sink_logits), ("out", out)
    for name, tensor in (*others.items(), *given):
        if tensor is not None:
            require(tensor.device == q.device, name, tensor.device,
                    "must be on the device of q, {}", q.device)  # fmt: skip
    return batch, tokens, heads, dim, v_pool.shape[2], k_pool.shape[0]
