"""Triton form of `torch.gdn_chunk`: S_t = e^{g_t} (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,
y_t = S_tᵀ q_t.

Gated DeltaNet (arXiv 2412.06464), chunked by the WY form (arXiv 2406.06484) for prefill and
training, in three passes (`chunk_passes`); backward keeps the inputs alone, computes
states again and walks back (`chunk_bwd`). Decays, the triangular solve, carried states
and accumulators are float32; operands of the products keep the inputs' dtype, states included,
which must therefore stay within it (float16: 65504). The oracle is `gdn_ref` of `torch`.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.gated_delta import chunk_bwd as bwd
from kernels.gated_delta import chunk_passes as passes
from kernels.gated_delta.chunk_passes import BACKWARD, FORWARD, HALF, WARPS, Config, Sizes
from kernels.recurrent.step import row_stride

MAX_N, MAX_P = 128, 256


def gdn_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
        s = Sizes.of(q, v, FORWARD)
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
    require_gpu("q", q, passes.gdn_chunk_fwd_rows_kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, T, G, N]")
    require(v.dim() == 4, "v", form(v), "must be [B, T, H, P]")
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[2:]
    require(min(batch, tokens) >= 1, "q", form(q), "must have B >= 1 and T >= 1")
    require(k.shape == q.shape, "k", form(k), "must have q's shape, {}", list(q.shape))
    require(v.shape[:2] == q.shape[:2], "v", form(v), "must be [{}, {}, H, P]", batch, tokens)
    require(groups > 0 and heads > 0 and heads % groups == 0, "v", form(v),
             "must have heads divisible by the {} groups of q and k", groups)  # fmt: skip
    for name, channels, most in (("N", n, MAX_N), ("P", p, MAX_P)):
        require(channels % 16 == 0 and 16 <= channels <= most, name, channels,
                 "must be a multiple of 16 up to {}", most)  # fmt: skip
    require(q.dtype in FORWARD, "q", form(q), "must be float32, bfloat16 or float16")
    for name, tensor in (("k", k), ("v", v)):
        require(tensor.dtype == q.dtype, name, form(tensor), "must have q's dtype, {}", q.dtype)
    for name, gate, dtypes in (
        ("log_decay", log_decay, [torch.float32]),
        ("beta", beta, list(FORWARD)),
    ):
        require(gate.shape == v.shape[:3], name, form(gate), "must be {}", list(v.shape[:3]))
        require(gate.dtype in dtypes, name, form(gate), "must be of {}", dtypes)
    inputs = [("q", q), ("k", k), ("v", v), ("log_decay", log_decay), ("beta", beta)]
    others = list(inputs)
    for name, given, shape, dtype in (
        ("state", state, (batch, heads, n, p), torch.float32),
        ("new", new, (batch,), torch.int32),
    ):
        if given is not None:
            fits = given.shape == shape and given.dtype == dtype and given.is_contiguous()
            require(fits, name, form(given), "must be contiguous {} {}", dtype, list(shape))
            others.append((name, given))
    for name, tensor in others:
        here = tensor.device == q.device
        require(here, name, form(tensor), "must be on the device of q, {}", q.device)
    for name, tensor in inputs:
        row_stride(name, tensor)


#: Key and value channels: published heads (Gated DeltaNet), masked ones, narrow ones.
SHAPES = ((128, 128), (96, 192), (16, 16), (128, 32))
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
#: Dtype -> how many of the shapes are compiled.
_COMPILED = {torch.bfloat16: 4, torch.float16: 1, torch.float32: 3}


def variants() -> list[Variant]:
    """Every kernel, dtype and tile; the options that cost nothing vary along with the shape."""
    found = [default_variant()]
    for dtype, count in _COMPILED.items():
        for shape in SHAPES[:count]:
            ragged = shape != SHAPES[0]
            found += [_solve(dtype, *shape, ragged, table) for table in (FORWARD, BACKWARD)]
            found += [_states(dtype, *shape, ragged, table) for table in (FORWARD, BACKWARD)]
            found += [_rows(dtype, *shape, ragged, out) for out in ("y", "local", "dq")]
            found += [_bwd_states(dtype, *shape, ragged), _bwd_keys(dtype, *shape, ragged)]
    return [*{v.name: v for v in [*found, _bwd_gates()]}.values()]


def default_variant() -> Variant:
    """The outputs y: bfloat16, heads of 128 by 128 (the published sizes)."""
    return _rows(torch.bfloat16, *SHAPES[0], False, "y")


Table = dict[torch.dtype, Config]

#: For an A100 ptxas stops at 72 registers and keeps a pair of them in memory while keys are read:
#: once a program, where a load of a whole tile is waited for.
SOLVE_SPILLS = 8


class _Form:
    """What the variants of one dtype and shape share."""

    def __init__(self, dtype: torch.dtype, n: int, p: int, ragged: bool, table: Table) -> None:
        self.s = Sizes(1, 1, 1, 2, n, p, table[dtype])
        self.dtype, self.kind = dtype, _POINTERS[dtype]
        self.new = "*i32" if ragged else None
        self.given = "*fp32" if ragged else None
        self.sizes: dict[str, Any] = {
            "SHARE": 2, "N": n, "P": p, "CHUNK": self.s.config.chunk, "PRECISION": "ieee",
        }  # fmt: skip

    def variant(
        self, name: str, kernel: Any, narrow: str, wide: str, others: dict[str, str | None],
        rows: str, constexprs: dict[str, Any], loaded: tuple[int, ...],
        warps: int = WARPS, stages: int = 1,
    ) -> Variant:  # fmt: skip
        """narrow, wide: pointers to the inputs' dtype and to float32; loaded: rows of the tiles
        that a step loads, then the columns of each."""
        height, *widths = loaded or (0,)
        pointers = dict.fromkeys(narrow.split(), self.kind) | dict.fromkeys(wide.split(), "*fp32")
        pointers |= {arg: kind for arg, kind in others.items() if kind}
        strides = [f"{arg}_row" for arg in rows.split()]
        integers = dict.fromkeys([*strides, "tokens", "chunks"], "i32")
        return Variant(
            name=f"gdn_chunk_{name}_{self.kind[1:]}_{self.s.n}x{self.s.p}",
            kernel=kernel,
            divisible=frozenset([*pointers, *strides]),
            signature=pointers | integers,
            constexprs=constexprs | {arg: None for arg, kind in others.items() if not kind},
            # Lanes of a warp are 64 at most.
            wide_loads=sum(height * w * self.dtype.itemsize // (1024 * warps) for w in widths),
            # Gates, one value a row, and tiles of few bytes.
            narrow_in_loops=TOKEN_LOADS,
            matrix=self.dtype != torch.float32 and "SHARE" in kernel.arg_names,
            num_warps=warps,
            num_stages=stages,
        )


def _solve(dtype: torch.dtype, n: int, p: int, ragged: bool, table: Table) -> Variant:
    f = _Form(dtype, n, p, ragged, table)
    chunk, block_n = f.s.config.chunk, f.s.config.tile
    half = min(chunk, HALF)
    found = f.variant(
        f"solve{chunk}", passes.gdn_chunk_fwd_solve_kernel, "k beta inverse", "log_decay total",
        {"new": f.new}, "k g b",
        {"SHARE": 2, "N": n, "CHUNK": chunk, "HALF": half, "BLOCK_N": block_n},
        (half, min(n, block_n), min(n, block_n)),
    )  # fmt: skip
    return replace(found, spills=SOLVE_SPILLS)


def _states(dtype: torch.dtype, n: int, p: int, ragged: bool, table: Table) -> Variant:
    f = _Form(dtype, n, p, ragged, table)
    config, back = f.s.config, table is BACKWARD
    return f.variant(
        "states_again" if back else "states", passes.gdn_chunk_fwd_states_kernel,
        "k v beta inverse states fresh", "total last",
        {"first": f.given, "new": f.new, "error": f.kind if back else None}, "k v b",
        f.sizes | {"BLOCK_N": f.s.block_n, "BLOCK_P": config.carried},
        (config.chunk, n, config.carried, config.chunk), config.carried_warps, config.stages,
    )  # fmt: skip


def _rows(dtype: torch.dtype, n: int, p: int, ragged: bool, out: str) -> Variant:
    f = _Form(dtype, n, p, ragged, FORWARD if out == "y" else BACKWARD)
    flip, local = out == "dq", out == "local"
    channels, wide = (p, n) if flip else (n, p)
    config = f.s.config
    others = {
        "new": f.new, "states": None if local else f.kind, "w": f.kind if flip else None,
        "change": "*fp32" if flip else None, "y": "*fp32" if flip else f.kind,
    }  # fmt: skip
    return f.variant(
        out, passes.gdn_chunk_fwd_rows_kernel, "a b x", "total", others, "a b x w",
        {
            "A_SHARE": 1 if flip else 2, "X_SHARE": 2 if flip else 1, "IN": channels, "OUT": wide,
            "STATE_IN": 1 if flip else wide, "STATE_OUT": channels if flip else 1,
            "CHUNK": config.chunk, "BLOCK_IN": config.tile, "BLOCK_OUT": config.tile,
            "PRECISION": "ieee", "REVERSED": local,
        },
        (config.chunk, *[min(config.tile, channels)] * 2, min(config.tile, wide)), config.warps,
    )  # fmt: skip


def _bwd_states(dtype: torch.dtype, n: int, p: int, ragged: bool) -> Variant:
    f = _Form(dtype, n, p, ragged, BACKWARD)
    chunk, (block_p, warps) = f.s.config.chunk, bwd.CARRIED[dtype]
    return f.variant(
        "dstates", bwd.gdn_chunk_bwd_states_kernel,
        "q k dy beta local error inverse later x dv", "total strength dfirst",
        {"dlast": f.given, "new": f.new}, "q k b",
        f.sizes | {"BLOCK_N": f.s.block_n, "BLOCK_P": block_p},
        (chunk, n, n, block_p, block_p, block_p, chunk), warps,
    )  # fmt: skip


def _bwd_keys(dtype: torch.dtype, n: int, p: int, ragged: bool) -> Variant:
    f = _Form(dtype, n, p, ragged, BACKWARD)
    block_n, block_p = bwd.KEYS[dtype]
    return f.variant(
        "dk", bwd.gdn_chunk_bwd_keys_kernel, "q k fresh dy x dv beta before later",
        "total dk change left strength kept", {"new": f.new}, "q k b",
        f.sizes | {"BLOCK_N": block_n, "BLOCK_P": block_p},
        (f.s.config.chunk, *[min(p, block_p)] * 6, *[min(n, block_n)] * 2),
    )  # fmt: skip


def _bwd_gates() -> Variant:
    f = _Form(torch.bfloat16, *SHAPES[0], True, BACKWARD)
    return f.variant(
        "dgates", bwd.gdn_chunk_bwd_gates_kernel, "dbeta",
        "asked moved left kept told missed dg", {"new": f.new}, "",
        {"QUERIES": 2, "KEYS": 4, "VALUES": 8, "CHUNK": 32}, (), warps=1,
    )  # fmt: skip
