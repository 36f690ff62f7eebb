"""The passes of `chunk`; the first two serve both directions of time.

h is the state before a chunk, g the gradient of the state after it, e^{ΛA} its decay, Λ = Σ Δ:
states  Σ e^{A Σ_{u>t} Δ_u} Δ_t x_t B_t;     Σ e^{A Σ_{u<=t} Δ_u} dy_t C_t
carry   h' = e^{ΛA} h + what a chunk adds;    g' = e^{ΛA} g + what a chunk adds
rows    the recurrence again from h, with y;  the same and its reverse from g, with gradients
A program holds a [BLOCK_E, BLOCK_N] tile of the state in registers and takes one token at a time.

B batch, T tokens, E channels, N states per channel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.recurrent.step import row_stride

#: Tokens per chunk. A program takes them one after another; chunks run side by side.
CHUNK = 64
#: Elements of the state per program. Forward, one warp holds them: reading out needs no barrier.
TILE = 512
MAX_STATES = 64

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Every size of one call; the legend is the module's."""

    batch: int
    tokens: int
    width: int
    n: int

    @classmethod
    def of(cls, x: Tensor, a: Tensor) -> "Sizes":
        batch, tokens, width = x.shape
        return cls(batch, tokens, width, a.shape[1])

    @property
    def chunks(self) -> int:
        """How many chunks the tokens fill."""
        return triton.cdiv(self.tokens, CHUNK)

    @property
    def tiles(self) -> int:
        """Tiles of channels."""
        return triton.cdiv(self.width, self.blocks["BLOCK_E"])

    @property
    def grid(self) -> tuple[int, int]:
        """One program per tile, chunk and sequence."""
        return self.tiles * self.chunks, self.batch

    @property
    def blocks(self) -> dict[str, int]:
        """The tile of the state, and what it is a tile of: constants of every kernel."""
        block_n = triton.next_power_of_2(self.n)
        block_e = min(128, TILE // block_n)
        return {"E": self.width, "N": self.n, "BLOCK_E": block_e, "BLOCK_N": block_n}


@triton.jit
def selective_chunk_token(h, rate, x, dt, b, in_e, in_n):  # type: ignore[no-untyped-def]
    """One token of the recurrence; x, dt, b point to its row. Returns h after it, x and Δ."""
    step = tl.load(dt, mask=in_e, other=0.0)
    xt = tl.load(x, mask=in_e, other=0.0).to(tl.float32)
    bt = tl.load(b, mask=in_n, other=0.0).to(tl.float32)
    return h * tl.exp2(step[:, None] * rate) + (step * xt)[:, None] * bt[None, :], xt, step


@triton.jit
def selective_chunk_fwd_states_kernel(  # type: ignore[no-untyped-def]
    x, dt, a, b, new, total, states,
    x_row, dt_row, b_row, tokens, chunks,
    CHUNK: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks × tiles of E, B): what a chunk adds to the state behind it, from zero.

    Reversed, x is dy and b is c. `total` [B, chunks, E] (Σ Δ) is written forward.
    """
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    chunk = tl.program_id(0) // tiles
    batch = tl.program_id(1).to(tl.int64)
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    count -= chunk * CHUNK
    e = tl.program_id(0) % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    inside = in_e[:, None] & in_n[None, :]
    tile = e[:, None] * N + n[None, :]
    rate = tl.load(a + tile, mask=inside, other=0.0) * LOG2E
    h = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    passed = tl.zeros([BLOCK_E], tl.float32)
    first = batch * tokens + chunk * CHUNK
    used = tl.minimum(CHUNK, tokens - chunk * CHUNK)
    for i in range(used):
        t = used - 1 - i if REVERSED else i
        row = first + t
        in_et, in_nt = in_e & (t < count), in_n & (t < count)
        if REVERSED:
            step = tl.load(dt + row * dt_row + e, mask=in_et, other=0.0)
            xt = tl.load(x + row * x_row + e, mask=in_et, other=0.0).to(tl.float32)
            bt = tl.load(b + row * b_row + n, mask=in_nt, other=0.0).to(tl.float32)
            h = (h + xt[:, None] * bt[None, :]) * tl.exp2(step[:, None] * rate)
        else:
            h, _, step = selective_chunk_token(
                h, rate, x + row * x_row + e, dt + row * dt_row + e, b + row * b_row + n,
                in_et, in_nt,
            )  # fmt: skip
            passed += step
    lane = batch * chunks + chunk
    tl.store(states + lane * E * N + tile, h, mask=inside)
    if not REVERSED:
        tl.store(total + lane * E + e, passed, mask=in_e)


@triton.jit
def selective_chunk_fwd_carry_kernel(  # type: ignore[no-untyped-def]
    first, a, total, states, last, chunks,
    E: tl.constexpr, N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of E, B): from what every chunk adds to what it starts from, in place.

    `first` (None: zeros) precedes the first chunk taken, `last` follows the last one.
    """
    batch = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e = e < E
    inside = in_e[:, None] & (n < N)[None, :]
    tile = e[:, None] * N + n[None, :]
    rate = tl.load(a + tile, mask=inside, other=0.0) * LOG2E
    current = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    if first is not None:
        current = tl.load(first + batch * E * N + tile, mask=inside, other=0.0)
    lane = batch * chunks
    sign = 1
    if REVERSED:
        lane += chunks - 1
        sign = -1
    # One chunk ahead of its use, so that the loads do not wait for each other.
    added = tl.load(states + lane * E * N + tile, mask=inside, other=0.0)
    passed = tl.load(total + lane * E + e, mask=in_e, other=0.0)
    for i in range(chunks):
        here = states + lane * E * N + tile
        lane += sign
        ahead = i + 1 < chunks
        later = tl.load(states + lane * E * N + tile, mask=inside & ahead, other=0.0)
        passes = tl.load(total + lane * E + e, mask=in_e & ahead, other=0.0)
        tl.store(here, current, mask=inside)
        current = tl.exp2(passed[:, None] * rate) * current + added
        added, passed = later, passes
    tl.store(last + batch * E * N + tile, current, mask=inside)


@triton.jit
def selective_chunk_fwd_rows_kernel(  # type: ignore[no-untyped-def]
    x, dt, a, b, c, d, new, states, y,
    x_row, dt_row, b_row, c_row, tokens, chunks,
    CHUNK: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (chunks × tiles of E, B): the outputs of a chunk from the state before it."""
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    chunk = tl.program_id(0) // tiles
    batch = tl.program_id(1).to(tl.int64)
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    count -= chunk * CHUNK
    e = tl.program_id(0) % tiles * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    inside = in_e[:, None] & in_n[None, :]
    tile = e[:, None] * N + n[None, :]
    rate = tl.load(a + tile, mask=inside, other=0.0) * LOG2E
    skip = tl.load(d + e, mask=in_e, other=0.0).to(tl.float32)
    h = tl.load(states + (batch * chunks + chunk) * E * N + tile, mask=inside, other=0.0)
    first = batch * tokens + chunk * CHUNK
    for t in range(tl.minimum(CHUNK, tokens - chunk * CHUNK)):
        row = first + t
        in_et, in_nt = in_e & (t < count), in_n & (t < count)
        h, xt, _ = selective_chunk_token(
            h, rate, x + row * x_row + e, dt + row * dt_row + e, b + row * b_row + n, in_et, in_nt
        )
        ct = tl.load(c + row * c_row + n, mask=in_nt, other=0.0).to(tl.float32)
        yt = tl.sum(h * ct[None, :], 1) + skip * xt
        tl.store(y + row * E + e, yt.to(y.dtype.element_ty), mask=in_e)


def states(
    sizes: Sizes, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, new: Tensor | None, total: Tensor,
    *, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """What every chunk adds: float32 [B, chunks, E, N]; forward, `total` is written.

    reverse: x is dy and b is c; they add to the gradient of the state before the chunk.
    """
    s = sizes
    added = torch.empty(s.batch, s.chunks, s.width, s.n, device=x.device)
    selective_chunk_fwd_states_kernel[s.grid](
        x, dt, a, b, new, total, added,
        row_stride("x", x), row_stride("dt", dt), row_stride("b", b), s.tokens, s.chunks,
        CHUNK=CHUNK, REVERSED=reverse, **s.blocks, num_warps=1,
    )  # fmt: skip
    return added


def carry(
    sizes: Sizes, first: Tensor | None, a: Tensor, total: Tensor, added: Tensor,
    *, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """Turn what chunks add into what they start from, in place.

    Returns the state at the far end, float32 [B, E, N].
    """
    s = sizes
    last = torch.empty(s.batch, s.width, s.n, device=added.device)
    selective_chunk_fwd_carry_kernel[(s.tiles, s.batch)](
        first, a, total, added, last, s.chunks, REVERSED=reverse, **s.blocks, num_warps=1
    )
    return last


def rows(
    sizes: Sizes, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor,
    new: Tensor | None, starts: Tensor,
) -> Tensor:  # fmt: skip
    """y [B, T, E] from the states that chunks start from."""
    s = sizes
    y = torch.empty(s.batch, s.tokens, s.width, dtype=x.dtype, device=x.device)
    selective_chunk_fwd_rows_kernel[s.grid](
        x, dt, a, b, c, d, new, starts, y,
        row_stride("x", x), row_stride("dt", dt), row_stride("b", b), row_stride("c", c),
        s.tokens, s.chunks, CHUNK=CHUNK, **s.blocks, num_warps=1,
    )  # fmt: skip
    return y
