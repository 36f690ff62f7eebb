"""`decay_chunk` of `torch` in Triton:
S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t.

Mamba-2's state-space duality (arXiv 2405.21060, section 6) and retention (arXiv 2307.08621) are
this recurrence; prefill and training run it by chunks of tokens, in three passes that backward
runs again in both directions of time (`chunk_passes`). Decays, running sums, states
and accumulators are float32; operands of the products keep the inputs' dtype, states included,
which must therefore stay within it (float16: 65504). The oracle is `decay_ref` of `torch`.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.checks import form, require
from kernels.decay import chunk_passes as passes
from kernels.decay.chunk_bwd import decay_chunk_bwd_decay_kernel, gradients
from kernels.decay.chunk_passes import CONFIGS
from kernels.recurrent.calls import TOKENS, floats, loads_of, narrow_products, scan_call
from kernels.recurrent.scan import ScanSizes, check_scan

MAX_CHANNELS = 256


def decay_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, *,
    new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form; differentiable.

    q, k: [B, T, G, N]; v: [B, T, H, P], all of one dtype (float32, bfloat16, float16), N and P
    multiples of 16 up to 256, tokens evenly spaced and each token's channels contiguous;
    log_decay: float32 [1 or B, 1 or T, H], <= 0; state: float32 [B, H, N, P] before
    the first token (None: zeros); new: int32 [B] valid tokens of right-padded rows (None: T):
    padded tokens leave the state as it is, and what they hold is not read.
    Returns y [B, T, H, P] in v's dtype, 0 at padded tokens, and the state after the last valid
    token, float32 [B, H, N, P].
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    _check(q, k, v, log_decay, state, new)
    y, last = _DecayChunk.apply(q, k, v, log_decay, state, new)
    return y, last


class _DecayChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor,
        state: Tensor | None, new: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        s = ScanSizes.of(q, v, CONFIGS[q.dtype].chunk)
        total = passes.sums(s, q)
        states = passes.contributions(s, k, v, log_decay, new, total)
        last, _ = passes.carry(s, state, states, total)
        y, _ = passes.rows(s, q, k, v, states, total, new, v.dtype)
        ctx.save_for_backward(q, k, v, log_decay, state, new)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        _, _, _, decay, state, _ = ctx.needs_input_grad
        q, k, v, log_decay, first, new = ctx.saved_tensors
        *inputs, dfirst = gradients(q, k, v, log_decay, first, new, dy, dlast, decay)
        return *inputs, dfirst if state else None, None


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, new: Tensor | None
) -> None:
    check_scan(
        passes.decay_chunk_fwd_rows_kernel, q, k, v, state, new, CONFIGS,
        (MAX_CHANNELS, MAX_CHANNELS), log_decay=log_decay,
    )  # fmt: skip
    batch, tokens, heads = v.shape[:3]
    fits = log_decay.dim() == 3 and log_decay.shape[0] in (1, batch)
    fits = fits and log_decay.shape[1] in (1, tokens) and log_decay.shape[2] == heads
    require(fits and log_decay.dtype == torch.float32, "log_decay", form(log_decay),
             "must be float32 [1 or {}, 1 or {}, {}]", batch, tokens, heads)  # fmt: skip


def variants() -> list[Variant]:
    """Every kernel, dtype and tile; the first are the outputs y at Mamba-2's sizes."""
    narrow, half, wide = torch.bfloat16, torch.float16, torch.float32

    def call(dtype: torch.dtype, n: int, p: int, options: str = "ragged") -> NamedCall:
        """options: "one" chunk; "fixed" decays, and heads that share nothing."""
        tokens, fixed = 50 if "one" in options else TOKENS, "fixed" in options
        rows = partial(meta, 1, tokens, dtype=dtype)
        decay = floats(1, 1 if fixed else tokens, 2).requires_grad_(not fixed)

        def scan(q: Tensor, k: Tensor, v: Tensor, *last: Any, **new: Any) -> tuple[Tensor, Tensor]:
            return decay_chunk(q, k, v, decay, *last, **new)

        inputs = [rows(1 + fixed, n), rows(1 + fixed, n), rows(2, p)]
        return scan_call(scan, inputs, (2, n, p), options)

    def tiles(*loaded: str) -> Expected:
        """Loads in loops are narrow for a chunk's decay."""
        return Expected(
            wide_loads=loads_of(*loaded), narrow_in_loops=frozenset({4}), matrix=narrow_products
        )

    outputs = {
        passes.decay_chunk_fwd_rows_kernel: tiles(
            "a CHUNK BLOCK_IN", "b CHUNK BLOCK_IN", "x CHUNK BLOCK_OUT", "w CHUNK BLOCK_OUT",
            "states BLOCK_IN BLOCK_OUT",
        )
    }  # fmt: skip
    contributions = tiles("a CHUNK BLOCK_N", "b CHUNK BLOCK_P")
    carry = {
        passes.decay_chunk_fwd_carry_kernel: tiles("first BLOCK", "fresh BLOCK", "states BLOCK")
    }
    calls = (
        call(narrow, 128, 64, ""), call(narrow, 128, 256), call(narrow, 64, 64),
        call(narrow, 80, 48), call(narrow, 16, 16),
        call(half, 128, 64, ""), call(half, 128, 256),
        call(wide, 128, 64, ""), call(wide, 128, 256),
    )  # fmt: skip
    fresh = {passes.decay_chunk_fwd_contributions_kernel: contributions}
    found = variants_of(calls, outputs | fresh)
    found += variants_of([call(narrow, 128, 256, "ragged fixed")], outputs)
    # What a state's size does to these two is not worth a variant for each shape.
    carries = ("carry", "carry given", "carry given one", "carry given fixed")
    found += variants_of([call(narrow, 128, 64, options) for options in carries], carry)
    dg = {decay_chunk_bwd_decay_kernel: tiles()}
    return found + variants_of([call(narrow, 128, 64, "ragged dg")], dg)
