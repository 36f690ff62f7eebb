"""`selective_scan` of `torch` in Triton: Mamba's S6 (arXiv 2312.00752, eq. 2),
h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t, y_t = C_t · h_t + D x_t.

Decays differ by channel and state, so no product of matrices does this: within a chunk, tokens
are taken one after another with the state in registers. What makes it parallel are chunks, in
three passes that backward runs in both directions of time (`chunk_passes`).
All arithmetic is float32. The oracle is `selective_scan_ref` of `torch`.

B batch, T tokens, E channels, N states per channel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.recurrent.step import row_stride
from kernels.selective import chunk_passes as passes
from kernels.selective.chunk_bwd import SUB, WARPS, gradients, selective_chunk_bwd_rows_kernel
from kernels.selective.chunk_passes import CHUNK, MAX_STATES, Sizes


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor | None = None,
    *,
    new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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


#: States per channel -> channels: the usual ones, the most, the fewest; rows that are not aligned.
SHAPES = {16: 4096, 64: 4096, 1: 4096, 63: 1001}
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def variants() -> list[Variant]:
    """Every kernel in every dtype and direction; sizes vary in bfloat16."""
    found = []
    for dtype in _POINTERS:
        for n in SHAPES if dtype == torch.bfloat16 else (16,):
            found += [_rows(dtype, n), _rows(dtype, n, backward=True)]
            found += [_states(dtype, n, reverse=reverse) for reverse in (False, True)]
    found += [
        _carry(n, given=given, reverse=reverse)
        for n in SHAPES
        for given in (False, True)
        for reverse in (False, True)
    ]
    return found


def default_variant() -> Variant:
    """The outputs y: bfloat16, 16 states."""
    return _rows(torch.bfloat16, 16)


def _variant(
    name: str, kernel: Any, n: int, given: dict[str, str], constexprs: dict[str, Any], tiles: int,
    warps: int = 1,
) -> Variant:  # fmt: skip
    """given: types that are not float32 pointers, "" for None; tiles: of the state, loaded."""
    constexprs = Sizes(1, 1, SHAPES[n], n).blocks | constexprs
    constexprs |= {arg: None for arg, kind in given.items() if not kind}
    signature = {}
    for arg in kernel.arg_names:
        if arg not in constexprs:
            integer = arg.endswith("_row") or arg in ("tokens", "chunks")
            signature[arg] = given.get(arg, "i32" if integer else "*fp32")
    aligned = [arg for arg, kind in signature.items() if kind[0] == "*"]
    if SHAPES[n] % 16 == 0:
        aligned += [arg for arg in signature if arg.endswith("_row")]
    # Rows of 63 floats are not aligned, and of 128 floats a lane takes 8 bytes.
    elements = 0 if n == 63 else constexprs["BLOCK_E"] * constexprs["BLOCK_N"]
    return Variant(
        name=f"selective_chunk_{name}_n{n}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=frozenset(aligned),
        num_warps=warps,
        wide_loads=tiles * (elements // (4 * 64 * warps)),
        narrow_in_loops=TOKEN_LOADS,
    )


def _states(dtype: torch.dtype, n: int, *, reverse: bool) -> Variant:
    kind = _POINTERS[dtype]
    return _variant(
        f"states{'_reversed' if reverse else ''}_{kind[1:]}",
        passes.selective_chunk_fwd_states_kernel,
        n,
        {"x": kind, "b": kind, "new": "" if n == 16 else "*i32"},
        {"CHUNK": CHUNK, "REVERSED": reverse},
        1,
    )


def _carry(n: int, *, given: bool, reverse: bool) -> Variant:
    return _variant(
        f"carry{'_reversed' if reverse else ''}{'_given' if given else ''}",
        passes.selective_chunk_fwd_carry_kernel,
        n,
        {} if given else {"first": ""},
        {"REVERSED": reverse},
        3 + given,
    )


def _rows(dtype: torch.dtype, n: int, *, backward: bool = False) -> Variant:
    kind = _POINTERS[dtype]
    given = dict.fromkeys(("x", "b", "c", "y", "dy", "dx"), kind)
    given["new"] = "" if n == 16 else "*i32"
    return _variant(
        f"{'gradients' if backward else 'y'}_{kind[1:]}",
        selective_chunk_bwd_rows_kernel if backward else passes.selective_chunk_fwd_rows_kernel,
        n,
        given,
        {"CHUNK": CHUNK, "SUB": SUB} if backward else {"CHUNK": CHUNK},
        5 if backward else 2,
        WARPS if backward else 1,
    )
