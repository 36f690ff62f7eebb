"""Our Mamba and Mamba-2 forms and gated norms against mamba-ssm's own references.

Their states are [B, H, P, N], ours [B, H, N, P]; their Mamba-1 sequences are channels first.
`selective_scan_ref` computes in float32 whatever it is given, the others keep float64.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.peers.forms import (
    BOTH,
    CONV,
    DECAY,
    NORMS,
    PLAIN_NORMS,
    SELECTIVE,
    SSM,
    Form,
    cases,
    close,
    compare,
    compare_gradients,
)

pytestmark = pytest.mark.peers

B, H, N, P, E = 2, 4, 32, 16, 24
#: Length -> a chunk that divides it, as theirs must.
CHUNKS = {1: 1, 11: 11, 63: 21, 65: 13, 130: 65}


def ssm_inputs(tokens: int, groups: int, dtype: torch.dtype) -> dict[str, Tensor]:
    b, c = torch.randn(2, B, tokens, groups, N, dtype=dtype) * N**-0.25
    x, z = torch.randn(2, B, tokens, H, P, dtype=dtype)
    return {
        "x": x,
        "dt": torch.randn(B, tokens, H, dtype=dtype),
        "b": b,
        "c": c,
        "a_log": torch.linspace(-1, 1, H, dtype=dtype),
        "d": torch.linspace(-1, 1, H, dtype=dtype),
        "dt_bias": torch.linspace(-4, 0.5, H, dtype=dtype),
        "z": z,
        "state": torch.randn(B, H, N, P, dtype=dtype),
    }


def selective_inputs(tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    b, c = torch.randn(2, B, tokens, N, dtype=dtype) * N**-0.25
    x, z, dt = torch.randn(3, B, tokens, E, dtype=dtype)
    return {
        "x": x,
        "dt": dt,
        "b": b,
        "c": c,
        "a_log": torch.linspace(-1, 1, E * N, dtype=dtype).view(N, E).t().contiguous(),
        "d": torch.linspace(-1, 1, E, dtype=dtype),
        "dt_bias": torch.linspace(-4, 0.5, E, dtype=dtype),
        "z": z,
        "state": torch.randn(B, E, N, dtype=dtype),
    }


def ssd_minimal(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete

    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
    before = state.transpose(-1, -2)[:, None]
    y, last = ssd_minimal_discrete(v, log_decay, k, q, CHUNKS[v.shape[1]], before)
    return y, last.transpose(-1, -2)


def state_update(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    z: Tensor, state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_state_update_ref` token by token: heads as Mamba-2, none as Mamba."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update_ref

    heads = x.dim() == 4
    a, held = -a_log.exp(), state.clone()
    if heads:
        a = a[:, None, None].expand(H, P, N)
        d, dt_bias = (t[:, None].expand(H, P) for t in (d, dt_bias))
        dt, held = dt[..., None].expand_as(x), held.transpose(-1, -2).contiguous()
    rows = [
        selective_state_update_ref(
            held, x[:, t], dt[:, t], a, b[:, t], c[:, t], d, z[:, t], dt_bias, dt_softplus=True
        )
        for t in range(x.shape[1])
    ]
    return torch.stack(rows, 1), held.transpose(-1, -2) if heads else held


def whole_scan(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from mamba_ssm.ops.selective_scan_interface import selective_scan_ref

    x, dt, b, c, z = (t.transpose(1, 2) for t in (x, dt, b, c, z))
    a = -a_log.exp()
    y, last = selective_scan_ref(
        x, dt, a, b, c, d, z, dt_bias, delta_softplus=True, return_last_state=True
    )
    return y.transpose(1, 2), last


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(DECAY, CHUNKS, BOTH))
def test_ssd_minimal_discrete(form: Form, dtype: torch.dtype, tokens: int, groups: int) -> None:
    compare(form, ssd_minimal, decay_inputs(tokens, groups, dtype))


@pytest.mark.parametrize(
    ("form", "dtype", "tokens"), cases([f for f in DECAY if f.chunked], [65], BOTH)
)
def test_gradients_of_ssd_minimal_discrete(form: Form, dtype: torch.dtype, tokens: int) -> None:
    compare_gradients(form, ssd_minimal, decay_inputs(tokens, 2, dtype))


def decay_inputs(tokens: int, groups: int, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k = torch.randn(2, B, tokens, groups, N, dtype=dtype) * N**-0.25
    return {
        "q": q,
        "k": k,
        "v": torch.randn(B, tokens, H, P, dtype=dtype),
        "log_decay": -torch.rand(B, tokens, H, dtype=dtype).square() - 0.01,
        "state": torch.randn(B, H, N, P, dtype=dtype),
    }


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(SSM, CHUNKS))
def test_ssd_chunk_scan_combined_ref(
    form: Form, dtype: torch.dtype, tokens: int, groups: int
) -> None:
    from mamba_ssm.ops.triton.ssd_combined import ssd_chunk_scan_combined_ref

    i = ssm_inputs(tokens, groups, dtype)
    expected = ssd_chunk_scan_combined_ref(
        i["x"], i["dt"], -i["a_log"].exp(), i["b"], i["c"], CHUNKS[tokens], i["d"], i["z"],
        i["dt_bias"], dt_softplus=True,
    )  # fmt: skip
    y, _ = form(**{**i, "state": torch.zeros_like(i["state"])})
    close(y, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(SSM, [1, 11, 65], BOTH))
def test_selective_state_update_ref_with_heads(
    form: Form, dtype: torch.dtype, tokens: int, groups: int
) -> None:
    compare(form, state_update, ssm_inputs(tokens, groups, dtype))


@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(SELECTIVE, [1, 11, 65], BOTH))
def test_selective_state_update_ref(form: Form, dtype: torch.dtype, tokens: int) -> None:
    compare(form, state_update, selective_inputs(tokens, dtype))


@pytest.mark.parametrize("cut", [0, 3], ids=["whole", "carried"])
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(SELECTIVE, [1, 11, 63, 130]))
def test_selective_scan_ref(form: Form, dtype: torch.dtype, tokens: int, cut: int) -> None:
    i = selective_inputs(tokens, dtype)
    i["state"].zero_()
    pieces, state = [], i["state"].clone()
    for rows in (slice(0, cut), slice(cut, tokens)):
        if rows.start >= min(rows.stop, tokens):
            continue
        part = {
            n: t[:, rows].contiguous() if t.shape[:2] == (B, tokens) else t for n, t in i.items()
        }
        y, state = form(**{**part, "state": state})
        pieces.append(y)
    del i["state"]
    expected, last = whole_scan(**i)
    close(torch.cat(pieces, 1), expected)
    close(state, last)


@pytest.mark.parametrize("form", [f for f in SELECTIVE if f.chunked], ids=str)
def test_gradients_of_selective_scan_ref(form: Form) -> None:
    i = selective_inputs(63, torch.float32)
    zeros = torch.zeros_like(i.pop("state"))
    compare_gradients(replace(form, run=partial(form.run, state=zeros)), whole_scan, i)


@pytest.mark.parametrize("group", [None, 25, 75], ids=str)
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate, norm", "norm, gate"])
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(NORMS, [1, 7], BOTH))
def test_gated_rms_norm_ref(
    form: Form, dtype: torch.dtype, tokens: int, gate_first: bool, group: int | None
) -> None:
    from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref

    def ours(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (form.run(x, z, weight, 1e-5, gate_first=gate_first, group=group),)

    def theirs(x: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor]:
        order = {"norm_before_gate": not gate_first, "upcast": False}
        return (rms_norm_ref(x, weight, None, z, eps=1e-5, group_size=group, **order),)

    x, z = torch.randn(2, 3, tokens, 75, dtype=dtype)
    # They hold the weight in float32 whatever x is.
    inputs = {"x": x, "z": z, "weight": torch.rand(75).to(dtype)}
    compare(replace(form, run=ours), theirs, inputs)
    if dtype == torch.float32:
        compare_gradients(replace(form, run=ours), theirs, inputs)


@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(PLAIN_NORMS, [1, 7], BOTH))
def test_rms_norm_ref(form: Form, dtype: torch.dtype, tokens: int) -> None:
    from mamba_ssm.ops.triton.layer_norm import rms_norm_ref

    def ours(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (form.run(x, weight, 1e-6),)

    def theirs(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (rms_norm_ref(x, weight, None, eps=1e-6),)

    x = torch.randn(3, tokens, 100, dtype=dtype)
    inputs = {"x": x, "weight": torch.rand(100, dtype=dtype)}
    compare(replace(form, run=ours), theirs, inputs)
    compare_gradients(replace(form, run=ours), theirs, inputs)


def padded_conv(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """Where it has no CUDA kernel, a block pads on both sides, convolves and cuts the end off."""
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=x.shape[2])
    return (F.silu(y[..., : x.shape[1]]).transpose(1, 2),)


@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(CONV, [1, 11, 65, 130], BOTH))
def test_convolution_of_a_block(form: Form, dtype: torch.dtype, tokens: int) -> None:
    x = torch.randn(B, tokens + 2, E, dtype=dtype)
    inputs = {"weight": torch.randn(E, 4, dtype=dtype), "bias": torch.randn(E, dtype=dtype)}
    tail = torch.zeros(B, 3, E, dtype=dtype)
    pieces = []
    for piece in (x[:, :2].contiguous(), x[:, 2:].contiguous()):
        y, tail = form(x=piece, state=tail, **inputs)
        pieces.append(y)
    close(torch.cat(pieces, 1), padded_conv(x, **inputs)[0])
    close(tail, x[:, -3:])
    if form.chunked:
        fresh = torch.zeros_like(tail)
        alone = replace(form, run=lambda **leaves: form.run(state=fresh, **leaves)[:1])
        compare_gradients(alone, padded_conv, {"x": x, **inputs})


def decoding(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Their block's own `step` over x [B, T, D]: y, the tail of its convolution, its state."""
    tail, state = block.allocate_inference_cache(B, 1)
    rows = [block.step(x[:, t : t + 1], tail, state)[0] for t in range(x.shape[1])]
    # They keep all W inputs of the last window, we the W - 1 that the next one needs.
    return torch.cat(rows, 1), tail[:, :, 1:].transpose(1, 2), state


def plain_step(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Let a block's `step` take its branch in plain torch."""
    patch.setattr(module, "selective_state_update", None)
    patch.setattr(module, "causal_conv1d_update", None)


@torch.no_grad()
@pytest.mark.parametrize("form", SSM, ids=str)
@pytest.mark.parametrize("conv", CONV, ids=str)
def test_step_of_a_mamba2_block(conv: Form, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_ssm.modules import mamba2

    plain_step(mamba2, monkeypatch)
    block = mamba2.Mamba2(32, d_state=N, headdim=P, expand=2, rmsnorm=False)
    block.D.normal_()
    x = torch.randn(B, 7, 32)
    expected, tail, state = decoding(block, x)

    z, mixed, dt = block.in_proj(x).split((64, 64 + 2 * N, 4), -1)
    mixed, our_tail = conv(
        x=mixed, weight=block.conv1d.weight[:, 0], bias=block.conv1d.bias,
        state=torch.zeros(B, 3, 64 + 2 * N),
    )  # fmt: skip
    inner, b, c = mixed.split((64, N, N), -1)
    y, our_state = form(
        x=inner.unflatten(-1, (4, P)), dt=dt, b=b[:, :, None], c=c[:, :, None],
        a_log=block.A_log, d=block.D, dt_bias=block.dt_bias, z=z.unflatten(-1, (4, P)),
        state=torch.zeros(B, 4, N, P),
    )  # fmt: skip
    close(block.out_proj(y.flatten(2)), expected)
    close(our_tail, tail)
    close(our_state, state.transpose(-1, -2))


@torch.no_grad()
@pytest.mark.parametrize("form", SELECTIVE, ids=str)
@pytest.mark.parametrize("conv", CONV, ids=str)
def test_step_of_a_mamba_block(conv: Form, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_ssm.modules import mamba_simple

    plain_step(mamba_simple, monkeypatch)
    block = mamba_simple.Mamba(16, d_state=N, expand=2, dt_rank=3)
    block.D.normal_()
    x = torch.randn(B, 7, 16)
    expected, tail, state = decoding(block, x)

    mixed, z = block.in_proj(x).chunk(2, -1)
    mixed, our_tail = conv(
        x=mixed, weight=block.conv1d.weight[:, 0], bias=block.conv1d.bias,
        state=torch.zeros(B, 3, 32),
    )  # fmt: skip
    dt, b, c = block.x_proj(mixed).split((3, N, N), -1)
    y, our_state = form(
        x=mixed, dt=dt @ block.dt_proj.weight.t(), b=b, c=c, a_log=block.A_log, d=block.D,
        dt_bias=block.dt_proj.bias, z=z, state=torch.zeros(B, 32, N),
    )  # fmt: skip
    close(block.out_proj(y), expected)
    close(our_tail, tail)
    close(our_state, state)
