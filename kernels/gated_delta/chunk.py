"""Triton form of `torch.gdn_chunk`: S_t = e^{g_t} (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,
y_t = S_tᵀ q_t.

Gated DeltaNet (arXiv 2412.06464), chunked by the WY form (arXiv 2406.06484) for prefill and
training, in three passes (`chunk_passes`); backward keeps the inputs alone, computes
states again and walks back (`chunk_bwd`). Decays, the triangular solve, carried states
and accumulators are float32; operands of the products keep the inputs' dtype, states included,
which must therefore stay within it (float16: 65504). The oracle is `gdn_ref` of `torch`.

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
from kernels.gated_delta import chunk_bwd as bwd
from kernels.gated_delta import chunk_passes as passes
from kernels.gated_delta.chunk_passes import FORWARD, sizes_of
from kernels.recurrent.calls import TOKENS, floats, loads_of, narrow_products, scan_call
from kernels.recurrent.scan import check_scan
from kernels.recurrent.step import row_stride

MAX_N, MAX_P = 128, 256


def gdn_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None,
    *, new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form; differentiable.

    q, k: [B, T, G, N], normalised and q scaled; v: [B, T, H, P], all of one dtype (float32,
    bfloat16, float16), N a multiple of 16 up to 128, P up to 256; log_decay: float32 [B, T, H],
    <= 0; beta: [B, T, H] of any of these dtypes; tokens evenly spaced and each token's channels
    contiguous; state: float32 [B, H, N, P] before the first token (None: zeros); new: int32 [B]
    valid tokens of right-padded rows (None: T): padded tokens leave the state as it is, and what
    they hold is not read.
    Returns y [B, T, H, P] in v's dtype, 0 at padded tokens, and the state after the last valid
    token, float32 [B, H, N, P].
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    _check(q, k, v, log_decay, beta, state, new)
    y, last = _GdnChunk.apply(q, k, v, log_decay, beta, state, new)
    return y, last


class _GdnChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
        state: Tensor | None, new: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        s = sizes_of(q, v, FORWARD)
        total, inverse = passes.solve(s, k, log_decay, beta, new)
        before, fresh, _, last = passes.states(s, k, v, beta, state, total, inverse, new)
        y, _ = passes.rows(s, q, k, fresh, before, total, new, v.dtype)
        ctx.save_for_backward(q, k, v, log_decay, beta, state, new)
        ctx.set_materialize_grads(False)
        return y, last

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
        passes.gdn_chunk_fwd_rows_kernel, q, k, v, state, new, FORWARD, (MAX_N, MAX_P),
        log_decay=log_decay, beta=beta,
    )  # fmt: skip
    gates = (("log_decay", log_decay, [torch.float32]), ("beta", beta, list(FORWARD)))
    for name, gate, dtypes in gates:
        require(gate.shape == v.shape[:3], name, form(gate), "must be {}", list(v.shape[:3]))
        require(gate.dtype in dtypes, name, form(gate), "must be of {}", dtypes)
        row_stride(name, gate)


#: For an A100 ptxas stops at 72 registers and keeps a pair of them in memory while keys are read:
#: once a program, where a load of a whole tile is waited for.
SOLVE_SPILLS = 8


def variants() -> list[Variant]:
    """Every kernel, dtype and tile; the first are the outputs y at the published sizes."""
    narrow, half, wide = torch.bfloat16, torch.float16, torch.float32

    def call(dtype: torch.dtype, n: int, p: int, options: str = "ragged given") -> NamedCall:
        rows = partial(meta, 1, TOKENS, dtype=dtype)
        inputs = [rows(8, n), rows(8, n), rows(16, p), floats(1, TOKENS, 16), rows(16)]
        return scan_call(gdn_chunk, inputs, (16, n, p), options)

    def solve_loads(v: Variant) -> int:
        """Of keys, twice; where heads are narrower than a tile, a compiler may keep them."""
        once = loads_of("k HALF BLOCK_N")(v)
        return once if v.constexprs["N"] < v.constexprs["BLOCK_N"] else 2 * once

    # Loads in loops are narrow for gates, one value a row, and tiles of few bytes.
    products = partial(Expected, narrow_in_loops=TOKEN_LOADS, matrix=narrow_products)
    loads = {
        passes.gdn_chunk_fwd_rows_kernel: loads_of(
            "a CHUNK BLOCK_IN", "b CHUNK BLOCK_IN", "x CHUNK BLOCK_OUT", "w CHUNK BLOCK_OUT",
            "states BLOCK_IN BLOCK_OUT",
        ),
        passes.gdn_chunk_fwd_states_kernel: loads_of(
            "k CHUNK BLOCK_N", "v CHUNK BLOCK_P", "inverse CHUNK CHUNK"
        ),
        bwd.gdn_chunk_bwd_states_kernel: loads_of(
            "q CHUNK BLOCK_N", "k CHUNK BLOCK_N", "dy CHUNK BLOCK_P", "local CHUNK BLOCK_P",
            "error CHUNK BLOCK_P", "inverse CHUNK CHUNK",
        ),
        bwd.gdn_chunk_bwd_keys_kernel: loads_of(
            "q CHUNK BLOCK_N", "k CHUNK BLOCK_N", "x CHUNK BLOCK_P", "dv CHUNK BLOCK_P",
            "dy CHUNK BLOCK_P", *["fresh CHUNK BLOCK_P"] * 3,
            "before BLOCK_N BLOCK_P", "later BLOCK_N BLOCK_P",
        ),
    }  # fmt: skip
    solve = products(wide_loads=solve_loads, spills=SOLVE_SPILLS)
    expected = {kernel: products(wide_loads=of) for kernel, of in loads.items()}
    calls = (
        call(narrow, 128, 128, ""), call(narrow, 96, 192), call(narrow, 16, 16),
        call(narrow, 128, 32), call(half, 128, 128, ""),
        call(wide, 128, 128, ""), call(wide, 96, 192), call(wide, 16, 16),
    )  # fmt: skip
    found = variants_of(calls, expected | {passes.gdn_chunk_fwd_solve_kernel: solve})
    gates = {bwd.gdn_chunk_bwd_gates_kernel: Expected(wide_loads=0, narrow_in_loops=TOKEN_LOADS)}
    return found + variants_of([call(narrow, 128, 128, "ragged gates")], gates)
