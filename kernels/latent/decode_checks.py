"""What `mla_decode` asks of its arguments, before any launch."""

import torch
from torch import Tensor

from kernels.checks import form, require
from kernels.device import interpreted, require_gpu

MAX_TOKENS = 4
#: Latent and rotary widths, R and r: each pair was compiled for every target.
WIDTHS = (
    (32, 16), (64, 16), (64, 32), (96, 16), (128, 16), (128, 32), (128, 64), (256, 32), (256, 64),
    (512, 64),
)  # fmt: skip
#: The same of latent heads that share one rotary key, whose rows lie apart.
WIDTHS_APART = (
    (32, 16), (32, 32), (48, 16), (64, 16), (64, 32), (128, 32), (128, 64), (256, 64),
)  # fmt: skip


def check(
    q: Tensor, q_rotary: Tensor, pool: Tensor, keys: Tensor | None, page_table: Tensor,
    lengths: Tensor, page_size: int, window: int | None, sinks: int, out: Tensor | None, *,
    kernel: object,
) -> int:  # fmt: skip
    """Every rule of `mla_decode`; returns G.

    kernel: in the interpreter it takes tensors on a CPU and float32, too.
    """
    require_gpu("q", q, kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, K, H, R]")
    batch, tokens, heads, query = q.shape
    latent = pool.shape[-1] if keys is not None and pool.dim() else query
    dtypes = (torch.bfloat16, torch.float16) + ((torch.float32,) if interpreted(kernel) else ())
    require(q.dtype in dtypes, "q", form(q), "must be bfloat16 or float16")
    fits = q_rotary.shape[:-1] == q.shape[:-1] and q_rotary.dtype == q.dtype
    require(fits, "q_rotary", form(q_rotary), "must be {} {}", q.dtype, [batch, tokens, heads, "r"])
    widths = latent, q_rotary.shape[3]
    served = WIDTHS if keys is None else WIDTHS_APART
    require(widths in served, "(R, r)", widths, "must be one of {}; use backend torch", served)
    require(0 < query <= latent and query % 16 == 0, "q", form(q),
            "must have a multiple of 16 columns, up to {}", latent)  # fmt: skip
    require(1 <= tokens <= MAX_TOKENS, "K", tokens, "new tokens must be 1 to {}", MAX_TOKENS)
    require(heads >= 1, "q", form(q), "must have at least one head")
    for name, part in (("q", q), ("q_rotary", q_rotary)):
        strides = [part.stride(i) for i in range(3) if part.shape[i] > 1]
        aligned = part.stride(3) == 1 and not any(s % 16 for s in strides)
        require(aligned and part.data_ptr() % 16 == 0, name, form(part),
                "must start at 16 bytes and have strides [16i, 16j, 16k, 1]")  # fmt: skip
    width = sum(widths) if keys is None else latent

    require(page_size == 1 or (page_size >= 16 and page_size % 16 == 0), "page_size", page_size,
            "must be 1 or a positive multiple of 16")  # fmt: skip
    shape = form(pool)
    fits = pool.dim() in (2, 3) and pool.shape[-1] == width and pool.shape[-2] % page_size == 0
    rule = "must be [pages * {0}, {1}] or [G, pages * {0}, {1}]"
    require(fits, "pool", shape, rule, page_size, width)
    groups = pool.shape[0] if pool.dim() == 3 else 1
    require(groups > 0 and heads % groups == 0, "pool", shape,
            "must have latent heads that divide the {} of q", heads)  # fmt: skip
    require(pool.dtype == q.dtype, "pool", shape, "must be {}, as q is", q.dtype)
    aligned = pool.stride()[-2:] == (width, 1) and pool.data_ptr() % 16 == 0
    aligned = aligned and (groups == 1 or not pool.stride(0) % 16)
    rule = "must start at 16 bytes and have strides [16i, {}, 1]"
    require(aligned, "pool", shape, rule, width)

    if keys is not None:
        fits = keys.shape == (pool.shape[-2], widths[1]) and keys.dtype == q.dtype
        fits = fits and keys.is_contiguous() and keys.data_ptr() % 16 == 0
        require(fits, "keys", form(keys), "must be contiguous {} {}, from 16 bytes on", q.dtype,
                [pool.shape[-2], widths[1]])  # fmt: skip
        require(window is None, "window", window, "must be None with keys apart")
        require(page_size > 1, "page_size", page_size, "must be above 1 with keys apart")
    require(window is None or window >= 1, "window", window, "must be None or at least 1")
    require(window is None or page_size > 1, "window", window, "must be None with pages of 1 row")
    require(sinks >= 0, "sinks", sinks, "must be at least 0")
    table = page_table.dim() == 2 and page_table.shape[0] == batch and page_table.shape[1] > 0
    table = table and page_table.dtype == torch.int32 and page_table.is_contiguous()
    require(table, "page_table", form(page_table),
            "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
    fits = lengths.shape == (batch,) and lengths.dtype == torch.int32 and lengths.is_contiguous()
    require(fits, "lengths", form(lengths), "must be contiguous int32 [{}]", batch)
    others = {"q_rotary": q_rotary, "pool": pool, "page_table": page_table, "lengths": lengths}
    if keys is not None:
        others["keys"] = keys
    if out is not None:
        others["out"] = out
        result = [batch, tokens, heads, latent]
        fits = list(out.shape) == result and out.dtype == q.dtype and out.is_contiguous()
        require(fits and out.data_ptr() % 16 == 0, "out", form(out),
                "must be contiguous {} {}, from 16 bytes on", q.dtype, result)  # fmt: skip
    for name, tensor in others.items():
        require(tensor.device == q.device, name, tensor.device,
                "must be on the device of q, {}", q.device)  # fmt: skip
    return groups
