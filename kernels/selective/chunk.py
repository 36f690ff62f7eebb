"""`selective_scan` of `torch` in Triton: Mamba's S6 (arXiv 2312.00752, eq. 2),
h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t, y_t = C_t · h_t + D x_t.

Decays differ by channel and state, so no product of matrices does this: within a chunk, tokens
are taken one after another with the state in registers. What makes it parallel are chunks, in
three passes that backward runs in both directions of time (`chunk_passes`).
All arithmetic is float32. The oracle is `selective_scan_ref` of `torch`.

B batch, T tokens, E channels, N states per channel.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.recurrent.calls import TOKENS, floats, loads_of, scan_call
from kernels.recurrent.step import row_stride
from kernels.selective import chunk_passes as passes
from kernels.selective.chunk_bwd import gradients, selective_chunk_bwd_rows_kernel
from kernels.selective.chunk_passes import MAX_STATES, Sizes


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None = None,
    *, new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan over T tokens by chunks; differentiable.

    x: [B, T, E]; dt: float32 [B, T, E], after softplus; a: float32 [E, N], negative, N 1 to 64;
    b, c: [B, T, N]; d: [E]; x, b, c, d in float32, bfloat16 or float16, tokens of x, dt, b, c
    evenly spaced, their channels contiguous; state: float32 [B, E, N] before the first token
    (None: zeros); new: int32 [B] valid tokens of right-padded rows (None: T): padded tokens leave
    the state as it is, and what they hold is not read.
    Returns y [B, T, E] in x's dtype, 0 at padded tokens, and the state after the last valid
    token, float32 [B, E, N].
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    _check(x, dt, a, b, c, d, state, new)
    y, last = _SelectiveChunk.apply(x, dt, a, b, c, d, state, new)
    return y, last


class _SelectiveChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor,
        state: Tensor | None, new: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        s = Sizes.of(x, a)
        total = torch.empty(s.batch, s.chunks, s.width, device=x.device)
        starts = passes.states(s, x, dt, a, b, new, total)
        last = passes.carry(s, state, a, total, starts)
        y = passes.rows(s, x, dt, a, b, c, d, new, starts)
        ctx.save_for_backward(x, dt, a, b, c, d, state, new)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, dstate = gradients(dy, dlast, *ctx.saved_tensors)
        return *inputs, dstate if ctx.needs_input_grad[6] else None, None


def _check(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor,
    state: Tensor | None, new: Tensor | None,
) -> None:  # fmt: skip
    require_gpu("x", x, passes.selective_chunk_fwd_rows_kernel)
    require(x.dim() == 3, "x", form(x), "must be [B, T, E]")
    require(a.dim() == 2, "a", form(a), "must be [E, N]")
    batch, tokens, width = x.shape
    n = a.shape[1]
    require(min(x.shape) >= 1, "x", form(x), "must have B >= 1, T >= 1 and E >= 1")
    require(1 <= n <= MAX_STATES, "N", n, "must be 1 to {}", MAX_STATES)
    floats = (torch.float32, torch.bfloat16, torch.float16)
    full = (torch.float32,)
    for name, tensor, shape, dtypes in (
        ("x", x, (batch, tokens, width), floats),
        ("dt", dt, (batch, tokens, width), full),
        ("a", a, (width, n), full),
        ("b", b, (batch, tokens, n), floats),
        ("c", c, (batch, tokens, n), floats),
        ("d", d, (width,), floats),
        ("state", state, (batch, width, n), full),
        ("new", new, (batch,), (torch.int32,)),
    ):
        if tensor is None:
            continue
        require(tensor.shape == shape, name, form(tensor), "must have shape {}", list(shape))
        kinds = ", ".join(str(dtype)[6:] for dtype in dtypes)
        require(tensor.dtype in dtypes, name, form(tensor), "must be of {}", kinds)
        here = tensor.device == x.device
        require(here, name, form(tensor), "must be on the device of x, {}", x.device)
        if name in ("x", "dt", "b", "c"):
            row_stride(name, tensor)
        else:
            require(tensor.is_contiguous(), name, form(tensor), "must be contiguous")


def variants() -> list[Variant]:
    """Every kernel in every dtype; states per channel, the usual ones first, vary in bfloat16."""
    narrow, half, wide = torch.bfloat16, torch.float16, torch.float32

    def call(dtype: torch.dtype, n: int, options: str = "", width: int = 4096) -> NamedCall:
        rows = partial(meta, 1, TOKENS)
        b, c = (rows(max(n, 16), dtype=dtype)[..., :n] for _ in range(2))
        x, dt = rows(width, dtype=dtype), rows(width, dtype=wide)
        inputs = [x, dt, floats(width, n), b, c, floats(width)]
        return scan_call(selective_scan, inputs, (width, n), options)

    def tiles(*pointers: str) -> Expected:
        """Of the state; rows of odd length are not aligned."""
        loads = loads_of(*(f"{pointer} BLOCK_E BLOCK_N" for pointer in pointers))
        return Expected(
            wide_loads=lambda v: 0 if v.constexprs["N"] % 4 else loads(v),
            narrow_in_loops=TOKEN_LOADS,
        )

    return variants_of(
        (
            call(narrow, 16), call(narrow, 16, "given"), call(half, 16), call(wide, 16),
            call(narrow, 64, "ragged"), call(narrow, 64, "ragged given"),
            call(narrow, 1, "ragged"), call(narrow, 1, "ragged given"),
            call(narrow, 63, "ragged", 1001), call(narrow, 63, "ragged given", 1001),
        ),
        {
            passes.selective_chunk_fwd_rows_kernel: tiles("a", "states"),
            passes.selective_chunk_fwd_states_kernel: tiles("a"),
            passes.selective_chunk_fwd_carry_kernel: tiles("a", "first", *["states"] * 2),
            selective_chunk_bwd_rows_kernel: tiles("a", "states", "later", *["scratch"] * 2),
        },
    )  # fmt: skip
