"""Triton form of `torch.gdn_chunk` with decays by key channel: S_t = (I - β_t k_t k_tᵀ) e^{g_t}
S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t, e^{g_t} a diagonal matrix. Strengths may be by channel, too:
S_t = (I - k_t (β_t ∘ k_t)ᵀ) e^{g_t} S_{t-1} + k_t v_tᵀ (arXiv 2605.22791).

Kimi Delta Attention (arXiv 2510.26692, section 3), chunked by the WY form (arXiv 2406.06484) for
prefill and training, in two passes (`channel_passes`); backward keeps the inputs alone, computes
states again and walks back (`channel_chunk_bwd`). Decays, the triangular solve, carried states and
accumulators are float32; operands of the products keep the inputs' dtype, states included, which
must therefore stay within it (float16: 65504). The oracle is `gdn_ref` of `torch`.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.checks import form, require
from kernels.gated_delta import channel_chunk_bwd as bwd
from kernels.gated_delta import channel_passes as passes
from kernels.gated_delta.channel_passes import CONFIGS, sizes_of
from kernels.recurrent.calls import TOKENS, floats, loads_of, narrow_products, scan_call
from kernels.recurrent.scan import check_scan
from kernels.recurrent.step import row_stride

MAX_N, MAX_P = 128, 256


def kda_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None,
    *, new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form; differentiable.

    q, k: [B, T, G, N], normalised and q scaled; v: [B, T, H, P], all of one dtype (float32,
    bfloat16, float16), N a multiple of 16 up to 128, P up to 256; log_decay: float32
    [B, T, H, N], <= 0; beta: [B, T, H], or by channel [B, T, H, N], of any of these dtypes; tokens
    evenly spaced and each token's channels contiguous; state: float32 [B, H, N, P] before the first
    token (None: zeros); new: int32 [B] valid tokens of right-padded rows (None: T): padded tokens
    leave the state as it is, and what they hold is not read.
    Returns y [B, T, H, P] in v's dtype, 0 at padded tokens, and the state after the last valid
    token, float32 [B, H, N, P].
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    _check(q, k, v, log_decay, beta, state, new)
    y, last = _KdaChunk.apply(q, k, v, log_decay, beta, state, new)
    return y, last


class _KdaChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
        state: Tensor | None, new: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        s = sizes_of(q, v)
        found = passes.pairs(s, q, k, log_decay, beta, new)
        ctx.save_for_backward(q, k, v, log_decay, beta, state, new)
        ctx.set_materialize_grads(False)
        return passes.outputs(s, found, v, beta, state, new)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, dstate = bwd.gradients(tuple(ctx.saved_tensors), dy, dlast)
        return *inputs, dstate if ctx.needs_input_grad[5] else None, None


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    state: Tensor | None, new: Tensor | None,
) -> None:  # fmt: skip
    check_scan(
        passes.kda_chunk_fwd_states_kernel, q, k, v, state, new, CONFIGS, (MAX_N, MAX_P),
        log_decay=log_decay, beta=beta,
    )  # fmt: skip
    by_channel = [*v.shape[:3], q.shape[3]]
    gates = (
        ("log_decay", log_decay, by_channel, [torch.float32]),
        ("beta", beta, by_channel[: max(beta.dim(), 3)], list(CONFIGS)),
    )
    for name, gate, shape, dtypes in gates:
        require(list(gate.shape) == shape, name, form(gate), "must be {}", shape)
        require(gate.dtype in dtypes, name, form(gate), "must be of {}", dtypes)
        row_stride(name, gate)


def variants() -> list[Variant]:
    """Every kernel, dtype and tile; the first are the outputs at the published sizes."""
    narrow, half, wide = torch.bfloat16, torch.float16, torch.float32

    def call(dtype: torch.dtype, n: int, p: int, options: str = "ragged given") -> NamedCall:
        rows = partial(meta, 1, TOKENS, dtype=dtype)
        strengths = (16, n) if "erasing" in options.split() else (16,)
        inputs = [
            rows(16, n), rows(16, n), rows(16, p), floats(1, TOKENS, 16, n), rows(*strengths)
        ]  # fmt: skip
        return scan_call(kda_chunk, inputs, (16, n, p), options)

    # Loads in loops are narrow where they are of one token: gates, and rows that are walked over.
    products = partial(Expected, narrow_in_loops=TOKEN_LOADS, matrix=narrow_products)
    keys = [f"{t} CHUNK BLOCK_N" for t in ("asked", "read", "left")]
    squares = [f"{t} CHUNK CHUNK" for t in ("weights", "inverse")]
    loads = {
        passes.kda_chunk_fwd_states_kernel: [*keys, *squares, "v CHUNK BLOCK_P"],
        bwd.kda_chunk_bwd_states_kernel: [*keys, *squares, "dy CHUNK BLOCK_P"],
        bwd.kda_chunk_bwd_scores_kernel: [
            f"{t} CHUNK BLOCK_P" for t in ("dy", "x", "fresh", "error")
        ],
        bwd.kda_chunk_bwd_keys_kernel: [
            "q CHUNK BLOCK_N", "k CHUNK BLOCK_N", "dy CHUNK BLOCK_P", "dv CHUNK BLOCK_P",
            "fresh CHUNK BLOCK_P", *["before BLOCK_N BLOCK_P"] * 2, "later BLOCK_N BLOCK_P",
        ],
    }  # fmt: skip
    expected = {kernel: products(wide_loads=loads_of(*of)) for kernel, of in loads.items()}
    pairs = Expected(wide_loads=0, narrow_in_loops=TOKEN_LOADS)
    calls = (
        call(narrow, 128, 128, ""), call(narrow, 96, 192), call(narrow, 16, 16),
        call(half, 128, 128, ""),
        call(wide, 128, 128, ""), call(wide, 96, 192), call(wide, 16, 16),
        call(narrow, 128, 128, "erasing"), call(narrow, 96, 192, "erasing ragged given"),
        call(half, 128, 128, "erasing"), call(wide, 128, 128, "erasing"),
    )  # fmt: skip
    return variants_of(calls, expected | {passes.kda_chunk_fwd_pairs_kernel: pairs})
