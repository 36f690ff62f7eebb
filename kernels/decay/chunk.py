"""`decay_chunk` of `torch` in Triton:
S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t.

Mamba-2's state-space duality (arXiv 2405.21060, section 6) and retention (arXiv 2307.08621) are
this recurrence; prefill and training run it by chunks of tokens, in three passes that backward
runs again in both directions of time (`chunk_passes`). Decays, running sums, states
and accumulators are float32; operands of the products keep the inputs' dtype, states included,
which must therefore stay within it (float16: 65504). The oracle is `decay_ref` of `decay_scan`.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot.ahead import Variant
from kernels.checks import form, require
from kernels.decay import chunk_passes as passes
from kernels.decay.chunk_bwd import decay_chunk_bwd_decay_kernel, gradients
from kernels.decay.chunk_passes import CONFIGS, Sizes
from kernels.device import require_gpu
from kernels.recurrent.step import row_stride

MAX_CHANNELS = 256


def decay_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
        s = Sizes.of(q, v)
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
    require_gpu("q", q, passes.decay_chunk_fwd_rows_kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, T, G, N]")
    require(v.dim() == 4, "v", form(v), "must be [B, T, H, P]")
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[2:]
    require(min(batch, tokens) >= 1, "q", form(q), "must have B >= 1 and T >= 1")
    require(k.shape == q.shape, "k", form(k), "must have q's shape, {}", list(q.shape))
    require(v.shape[:2] == q.shape[:2], "v", form(v), "must be [{}, {}, H, P]", batch, tokens)
    require(groups > 0 and heads > 0 and heads % groups == 0, "v", form(v),
             "must have heads divisible by the {} groups of q and k", groups)  # fmt: skip
    for name, channels in (("N", n), ("P", p)):
        require(channels % 16 == 0 and 16 <= channels <= MAX_CHANNELS, name, channels,
                 "must be a multiple of 16 up to {}", MAX_CHANNELS)  # fmt: skip
    require(q.dtype in CONFIGS, "q", form(q), "must be float32, bfloat16 or float16")
    for name, tensor in (("k", k), ("v", v)):
        require(tensor.dtype == q.dtype, name, form(tensor), "must have q's dtype, {}", q.dtype)
    fits = log_decay.dim() == 3 and log_decay.shape[0] in (1, batch)
    fits = fits and log_decay.shape[1] in (1, tokens) and log_decay.shape[2] == heads
    require(fits and log_decay.dtype == torch.float32, "log_decay", form(log_decay),
             "must be float32 [1 or {}, 1 or {}, {}]", batch, tokens, heads)  # fmt: skip
    others = [("k", k), ("v", v), ("log_decay", log_decay)]
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
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        row_stride(name, tensor)


#: Head sizes: Mamba-2's, the linear model's of 1b, one tile, and masked ones.
SHAPES = ((128, 64), (128, 256), (64, 64), (80, 48), (16, 16))
_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
#: What the third pass computes -> REVERSED, and whether from Sᵀ (then with the gradient of g).
_ROWS = {"y": (False, False), "dv": (True, False), "dq": (False, True), "dk": (True, True)}


def variants() -> list[Variant]:
    """Every kernel in every direction and dtype; the options that cost nothing vary along."""
    found, both = [], (False, True)
    for dtype in _POINTERS:
        for n, p in SHAPES if dtype == torch.bfloat16 else SHAPES[:2]:
            found += [_rows(dtype, n, p, out) for out in _ROWS]
            found += [_contributions(dtype, n, p, reverse=reverse) for reverse in both]
    found += [_rows(torch.bfloat16, *SHAPES[1], out, learned=False) for out in ("dq", "dk")]
    found += [_carry(given=given, reverse=reverse) for given in both for reverse in both]
    found += [_carry(given=True, reverse=reverse, chunks=1) for reverse in both]
    return [*found, _carry(given=True, reverse=True, learned=False), _decay()]


def default_variant() -> Variant:
    """The outputs y: bfloat16, heads of 128 by 64 (Mamba-2's)."""
    return _rows(torch.bfloat16, *SHAPES[0], "y")


def _variant(
    name: str, kernel: Any, arguments: dict[str, str], constexprs: dict[str, Any],
    wide_loads: int, warps: int, *, matrix: bool = False,
) -> Variant:  # fmt: skip
    """arguments: types, "" for what is None; pointers and rows of tokens are divisible by 16."""
    signature = {arg: kind for arg, kind in arguments.items() if kind}
    aligned = (arg for arg, kind in signature.items() if kind[0] == "*" or arg.endswith("_row"))
    return Variant(
        name=f"decay_chunk_{name}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs | {arg: None for arg, kind in arguments.items() if not kind},
        divisible=frozenset(aligned),
        num_warps=warps,
        num_stages=1,
        wide_loads=wide_loads,
        # A chunk's decay.
        narrow_in_loops=frozenset({4}),
        matrix=matrix,
    )


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _tile_loads(dtype: torch.dtype, tiles: int, warps: int) -> int:
    """Loads of 16 bytes, by 64 lanes a warp at most, for tiles of a chunk's tokens."""
    c = CONFIGS[dtype]
    return tiles * c.chunk * c.tile * dtype.itemsize // (16 * 64 * warps)


def _contributions(dtype: torch.dtype, n: int, p: int, *, reverse: bool) -> Variant:
    kind, config = _POINTERS[dtype], CONFIGS[dtype]
    pointers = {"a": kind, "b": kind, "log_decay": "*fp32", "total": "*fp32", "fresh": "*fp32"}
    return _variant(
        f"contributions{'_reversed' if reverse else ''}_{kind[1:]}_{n}x{p}",
        passes.decay_chunk_fwd_contributions_kernel,
        pointers
        | {"new": "" if (n, p) == SHAPES[0] else "*i32"}
        | _integers("a_row", "b_row", "g_batch", "g_token", "tokens", "chunks"),
        {
            "g_head": 1, "SHARE": 2, "N": n, "P": p, "CHUNK": config.chunk,
            "BLOCK_N": config.tile, "BLOCK_P": config.tile, "PRECISION": "ieee",
            "REVERSED": reverse,
        },
        _tile_loads(dtype, 2, passes.CONTRIBUTION_WARPS),
        passes.CONTRIBUTION_WARPS,
        matrix=dtype != torch.float32,
    )  # fmt: skip


def _carry(
    *, given: bool, reverse: bool, learned: bool = True, chunks: int | None = None
) -> Variant:
    """learned: whether log_decay has a gradient. The launcher makes a constant of one chunk."""
    kept = "*fp32" if reverse and learned else ""
    pointers = dict.fromkeys(("fresh", "total", "last"), "*fp32")
    block = passes.CARRY_BLOCK
    options = f"{'_reversed' if reverse else ''}{'_given' if given else ''}"
    return _variant(
        f"carry{options}{'_one' if chunks else ''}{'' if learned else '_fixed'}",
        passes.decay_chunk_fwd_carry_kernel,
        pointers
        | {"first": "*fp32" if given else "", "states": kept, "kept": kept}
        | ({} if chunks else _integers("chunks")),
        {"SIZE": 128 * 64, "CHUNK": 64, "BLOCK": block, "REVERSED": reverse}
        | ({"chunks": chunks} if chunks else {}),
        (1 + given + bool(kept)) * block * 4 // (16 * 64),
        1,
    )


def _rows(dtype: torch.dtype, n: int, p: int, out: str, *, learned: bool = True) -> Variant:
    """learned: whether log_decay has a gradient; where it has none, heads here share nothing."""
    kind, config = _POINTERS[dtype], CONFIGS[dtype]
    reverse, transpose = _ROWS[out]
    channels, wide = (p, n) if transpose else (n, p)
    change, share = transpose and learned, 2 if learned else 1
    pointers = {
        "a": kind, "b": kind, "x": kind, "w": kind if change else "", "states": "*fp32",
        "total": "*fp32", "new": "" if (n, p) == SHAPES[0] else "*i32",
        "y": "*fp32" if change else kind, "change": "*fp32" if change else "",
    }  # fmt: skip
    return _variant(
        f"{out}_{kind[1:]}_{n}x{p}{'' if learned else '_fixed'}",
        passes.decay_chunk_fwd_rows_kernel,
        pointers | _integers("a_row", "b_row", "x_row", "w_row", "tokens", "chunks"),
        {
            "A_SHARE": 1 if transpose else share, "X_SHARE": share if transpose else 1,
            "IN": channels, "OUT": wide, "STATE_IN": 1 if transpose else wide,
            "STATE_OUT": channels if transpose else 1, "CHUNK": config.chunk,
            "BLOCK_IN": config.tile, "BLOCK_OUT": config.tile, "PRECISION": "ieee",
            "REVERSED": reverse,
        },
        _tile_loads(dtype, 3 + change, config.warps) + config.tile**2 * 4 // (1024 * config.warps),
        config.warps,
        matrix=dtype != torch.float32,
    )  # fmt: skip


def _decay() -> Variant:
    pointers = dict.fromkeys(("change", "left", "kept", "out"), "*fp32") | {"new": "*i32"}
    constexprs = {"TILES": 2, "BLOCKS": 16, "BLOCKS_UP": 16, "CHUNK": 64}
    arguments = pointers | _integers("tokens", "chunks")
    return _variant("dg", decay_chunk_bwd_decay_kernel, arguments, constexprs, 0, 1)
