"""What `attention_decode` asks of its arguments, before any launch."""

from typing import Any

import torch
from torch import Tensor

from kernels.checks import form, require
from kernels.device import gpu, interpreted, require_gpu

MAX_TOKENS = 9
HEAD_DIMS = (32, 64, 128, 256)
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
#: Most rows of a tile (`decode_configs`).
MAX_TILE = 128


def check(
    q: Tensor, k_pool: Tensor, v_pool: Tensor | None, page_table: Tensor, lengths: Tensor,
    page_size: int, window: int | None, sinks: int, k_scale: Tensor | None, v_scale: Tensor | None,
    sink_logits: Tensor | None, cos_sin: Tensor | None, key_weight: Tensor | None,
    out: Tensor | None, *, kernel: object,
) -> tuple[int, int, int, int, int]:  # fmt: skip
    """Every rule of `attention_decode`; returns B, K, H, d, G.

    kernel: in the interpreter it takes tensors on a CPU and float32, too.
    """
    require_gpu("q", q, kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, K, H, d]")
    batch, tokens, heads, dim = q.shape
    dtypes = (torch.bfloat16, torch.float16) + ((torch.float32,) if interpreted(kernel) else ())
    require(q.dtype in dtypes, "q", form(q), "must be bfloat16 or float16")
    require(dim in HEAD_DIMS, "head_dim", dim, "must be one of {}", HEAD_DIMS)
    require(1 <= tokens <= MAX_TOKENS, "K", tokens, "new tokens must be 1 to {}", MAX_TOKENS)
    strides = [q.stride(i) for i in range(3) if q.shape[i] > 1]
    aligned = q.stride(3) == 1 and not any(s % 16 for s in strides) and q.data_ptr() % 16 == 0
    rule = "must start at 16 bytes and have strides [16i, 16j, 16k, 1]"
    require(aligned, "q", form(q), rule)

    require(page_size == 1 or (page_size >= 16 and page_size % 16 == 0), "page_size", page_size,
            "must be 1 or a positive multiple of 16")  # fmt: skip
    tied = v_pool is None
    v_pool = k_pool if v_pool is None else v_pool
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        shape = form(pool)
        fits = pool.dim() == 3 and pool.shape[2] == dim and pool.shape[1] % page_size == 0
        require(fits, name, shape, "must be [G, pages * {}, {}]", page_size, dim)
        require(pool.shape[0] > 0 and heads % pool.shape[0] == 0, name, shape,
                 "must have heads that divide the {} of q", heads)  # fmt: skip
        require(pool.dtype in (q.dtype, *EIGHT_BIT), name, shape,
                 "must be {}, int8 or float8_e4m3fn", q.dtype)  # fmt: skip
        # Pairs of 8-bit values are read as one word.
        unit = 32 if pool.dtype in EIGHT_BIT else 16
        aligned = pool.stride()[1:] == (dim, 1) and not pool.stride(0) % unit
        require(aligned and pool.data_ptr() % 16 == 0, name, shape,
                 "must start at 16 bytes and have strides [{}i, {}, 1]", unit, dim)  # fmt: skip
    same = v_pool.dtype == k_pool.dtype and v_pool.shape == k_pool.shape
    require(same, "v_pool", form(v_pool), "must have k_pool's form, {}", form(k_pool))
    kv_heads = k_pool.shape[0]
    eight_bit = k_pool.dtype in EIGHT_BIT
    if k_pool.dtype == torch.float8_e4m3fn:
        able = gpu(q.device).capability >= (8, 9)
        require(able, "k_pool", form(k_pool), "needs compute capability 8.9; use int8")

    require(window is None or window >= 1, "window", window, "must be None or at least 1")
    require(window is None or page_size > 1, "window", window, "must be None with pages of 1 row")
    require(sinks >= 0, "sinks", sinks, "must be at least 0")
    i32, f32 = torch.int32, torch.float32
    table = page_table.dim() == 2 and page_table.shape[0] == batch and page_table.dtype == i32
    table = table and page_table.shape[1] > 0
    require(table and page_table.is_contiguous(), "page_table", form(page_table),
             "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
    fits = lengths.shape == (batch,) and lengths.dtype == i32 and lengths.is_contiguous()
    require(fits, "lengths", form(lengths), "must be contiguous {} [{}]", i32, batch)
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        wanted = eight_bit and not (tied and name == "v_scale")
        require((given is not None) == wanted, name, given if given is None else form(given),
                 "must be given exactly when K and V hold 8 bits")  # fmt: skip
        if given is None:
            continue
        fits = given.shape == k_pool.shape[:2] and given.dtype == f32 and given.stride(1) == 1
        require(fits, name, form(given), "must be {} {}, the rows of a head together",
                f32, list(k_pool.shape[:2]))  # fmt: skip
    require((cos_sin is None) != tied, "cos_sin", None if cos_sin is None else form(cos_sin),
            "must be given exactly when v_pool is None")  # fmt: skip
    if cos_sin is not None:
        fits = cos_sin.dim() == 3 and cos_sin.shape[1:] == (dim // 2, 2) and cos_sin.dtype == f32
        fits = fits and len(cos_sin) >= MAX_TILE and cos_sin.is_contiguous()
        require(fits and cos_sin.data_ptr() % 16 == 0, "cos_sin", form(cos_sin),
                "must be contiguous {} [>= {}, {}, 2], from 16 bytes on",
                f32, MAX_TILE, dim // 2)  # fmt: skip
        require(window is None and page_size > 1, "cos_sin", form(cos_sin),
                "must be None with a window, and with pages of 1 row")  # fmt: skip
    require(key_weight is None or tied, "key_weight", "given", "must be None without cos_sin")
    for name, given, size in (("sink_logits", sink_logits, heads), ("key_weight", key_weight, dim)):
        if given is not None:
            fits = given.shape == (size,) and given.dtype == q.dtype and given.is_contiguous()
            require(fits, name, form(given), "must be contiguous {} [{}]", q.dtype, size)
    if out is not None:
        fits = out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
        require(fits and out.data_ptr() % 16 == 0, "out", form(out),
                 "must be contiguous {} {}, from 16 bytes on", q.dtype, list(q.shape))  # fmt: skip
    others: list[tuple[str, Any]] = [("k_pool", k_pool), ("v_pool", v_pool), ("out", out)]
    others += [("page_table", page_table), ("lengths", lengths)]
    others += [("k_scale", k_scale), ("v_scale", v_scale), ("sink_logits", sink_logits)]
    others += [("cos_sin", cos_sin), ("key_weight", key_weight)]
    for name, tensor in others:
        here = tensor is None or tensor.device == q.device
        require(here, name, tensor.device if tensor is not None else None,
                 "must be on the device of q, {}", q.device)  # fmt: skip
    return batch, tokens, heads, dim, kv_heads
