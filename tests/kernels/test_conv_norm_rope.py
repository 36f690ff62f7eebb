"""Short convolution, norms, SwiGLU and rotary positions against oracles and transformers."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels.conv.torch import causal_conv, causal_conv_ref, conv_tail, conv_tails
from kernels.norm.torch import gated_rms_norm, l2_norm, rms_norm, swiglu
from kernels.rope.torch import (
    apply_rope,
    apply_rope_,
    earlier,
    half_to_interleaved,
    rope_table,
    rotate_last,
    turned_back,
)


@pytest.mark.parametrize("tokens", [1, 2, 63])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_conv_equals_the_oracle_and_continues(tokens: int, bias: bool) -> None:
    x, weight = torch.randn(2, tokens, 5), torch.randn(5, 4)
    tail, offset = torch.randn(2, 3, 5), torch.randn(5) if bias else None
    expected = causal_conv_ref(x, weight, offset, tail)
    y = causal_conv(x, weight, offset, tail, silu=False)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    activated = causal_conv(x, weight, offset, tail)
    torch.testing.assert_close(activated.double(), F.silu(expected), rtol=1e-5, atol=1e-5)
    more = torch.randn(2, 7, 5)
    later = causal_conv(more, weight, offset, conv_tail(x, tail, 4), silu=False)
    joined = causal_conv_ref(torch.cat((x, more), 1), weight, offset, tail)
    torch.testing.assert_close(later.double(), joined[:, tokens:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 63])
def test_conv_rounds_to_16_bits_once(tokens: int, dtype: torch.dtype) -> None:
    x, weight, tail, offset = (
        torch.randn(s).to(dtype) for s in ((2, tokens, 5), (5, 4), (2, 3, 5), (5,))
    )
    y = causal_conv(x, weight, offset, tail, silu=False)
    expected = causal_conv_ref(x, weight, offset, tail)
    assert y.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(y.double(), expected, rtol=half, atol=1e-6)


def test_conv_tails_of_ragged_batches() -> None:
    x, tail = torch.randn(3, 6, 5), torch.randn(3, 3, 5)
    every = conv_tails(x, tail, 4)
    new = torch.tensor([0, 2, 6])
    after = conv_tail(x, tail, 4, new=new)
    assert torch.equal(after[0], tail[0])
    assert torch.equal(after[1], every[1, 1])
    assert torch.equal(after[2], every[2, 5])
    assert torch.equal(conv_tail(x, tail, 4), every[:, -1])


def test_conv_gradients() -> None:
    shapes = [(2, 9, 3), (3, 4), (3,), (2, 3, 3)]
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(causal_conv, args)


def test_conv_refuses_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="tail of 3 rows"):
        causal_conv(torch.randn(1, 4, 5), torch.randn(5, 4), tail=torch.randn(1, 2, 5))


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 63, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_rms_norm_equals_torch(shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_(training)
    weight = torch.randn(shape[-1]).to(dtype)
    got = rms_norm(x, weight, 1e-5)
    expected = F.rms_norm(x.detach().double(), shape[-1:], weight.double(), 1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert got.dtype == dtype
    torch.testing.assert_close(got.detach().double(), expected, rtol=tolerance, atol=tolerance)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert not rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5).any()


def test_norm_and_swiglu_gradients() -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_swiglu_is_the_same_with_and_without_gradients() -> None:
    x = torch.randn(4, 10)
    expected = F.silu(x[:, :5]) * x[:, 5:]
    torch.testing.assert_close(swiglu(x), expected)
    torch.testing.assert_close(swiglu(x.requires_grad_()).detach(), expected)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def test_gate_order_and_groups() -> None:
    x, gate, weight = torch.randn(2, 3, 12), torch.randn(2, 3, 12), torch.randn(12)
    after = gated_rms_norm(x, gate, weight, 1e-5, gate_first=False)
    torch.testing.assert_close(after, _norm(x, weight) * F.silu(gate))
    before = gated_rms_norm(x, gate, weight, 1e-5, gate_first=True)
    torch.testing.assert_close(before, _norm(x * F.silu(gate), weight))
    grouped = gated_rms_norm(x, gate, weight, 1e-5, gate_first=True, group=4)
    parts = (x * F.silu(gate)).split(4, -1)
    expected = torch.cat([_norm(p, w) for p, w in zip(parts, weight.split(4), strict=True)], -1)
    torch.testing.assert_close(grouped, expected)
    for first, expected in (
        (False, _norm(x, weight) * gate.sigmoid()), (True, _norm(x * gate.sigmoid(), weight)),
    ):  # fmt: skip
        opened = gated_rms_norm(x, gate, weight, 1e-5, gate_first=first, opened="sigmoid")
        torch.testing.assert_close(opened, expected)
    with pytest.raises(ValueError, match="not divisible by group=5"):
        gated_rms_norm(x, gate, weight, 1e-5, gate_first=True, group=5)


def test_l2_norm_has_unit_length() -> None:
    x = torch.randn(4, 7)
    torch.testing.assert_close(l2_norm(x).square().sum(-1), torch.ones(4), rtol=1e-4, atol=1e-4)
    assert not l2_norm(torch.zeros(2, 3)).any()


@pytest.mark.parametrize("dim", [2, 6, 32])
def test_interleaved_rope_equals_llama_after_permuting_channels(dim: int) -> None:
    q, k = torch.randn(2, 2, 3, 11, dim)
    angles = rope_table(11, dim, 10_000.0, torch.device("cpu"))[:11]
    half = torch.cat((angles.angle(), angles.angle()), -1).transpose(0, 1)
    expected_q, expected_k = apply_rotary_pos_emb(q, k, half.cos(), half.sin())
    p = half_to_interleaved(dim)

    def heads_first(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        return apply_rope(x.transpose(1, 2), angles).transpose(1, 2)

    torch.testing.assert_close(heads_first(q[..., p], angles), expected_q[..., p])
    torch.testing.assert_close(heads_first(k[..., p], angles), expected_k[..., p])


def test_rope_in_place_on_a_slice_and_per_sequence() -> None:
    x = torch.randn(2, 7, 5, 8)
    table = rope_table(64, 8, 10_000.0, torch.device("cpu"))
    angles = table[torch.tensor([[3, 4, 5, 6, 7, 8, 9], [20, 21, 22, 23, 24, 25, 26]])]
    expected = apply_rope(x[:, :, :3], angles)
    rest = x[:, :, 3:].clone()
    apply_rope_(x[:, :, :3], angles)
    torch.testing.assert_close(x[:, :, :3], expected)
    assert torch.equal(x[:, :, 3:], rest)
    half = x.bfloat16()
    torch.testing.assert_close(apply_rope_(half, angles).float(), apply_rope(x, angles),
                               rtol=2e-2, atol=3e-2)  # fmt: skip


@pytest.mark.parametrize("turned", [0, 2, 6, 10])
def test_part_of_a_head_rotates_and_the_rest_stays_exactly(turned: int) -> None:
    x = torch.randn(2, 9, 3, 10)
    got = apply_rope(x, rope_table(9, 10, 50.0, torch.device("cpu"), turned)[:9])
    assert torch.equal(got[..., turned:], x[..., turned:])
    if turned:
        alone = apply_rope(x[..., :turned], rope_table(9, turned, 50.0, torch.device("cpu"))[:9])
        torch.testing.assert_close(got[..., :turned], alone)
    with pytest.raises(ValueError, match=r"turned=12 must be one of 0\.\.10"):
        rope_table(9, 10, 50.0, torch.device("cpu"), 12)


@pytest.mark.parametrize("real", [False, True], ids=["complex", "real"])
def test_angles_turn_back_and_lie_earlier_and_turn_last_channels(real: bool) -> None:
    """Real numbers are what compiled code gets."""
    table = rope_table(200, 6, 160_000.0, torch.device("cpu"))
    angles, wanted = table[torch.tensor([[130, 199, 127]])], table[torch.tensor([[3, 72, 0]])]
    given = torch.view_as_real(angles) if real else angles
    found = earlier(given, 127, 160_000.0)
    found = torch.view_as_complex(found) if real else found
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    x = torch.randn(1, 3, 2, 10)
    turned = rotate_last(x.clone(), given)
    assert torch.equal(turned[..., :4], x[..., :4])
    torch.testing.assert_close(turned[..., 4:], apply_rope(x[..., 4:], angles))
    torch.testing.assert_close(rotate_last(turned, turned_back(given)), x)
    if not real:
        asked = x.clone().requires_grad_()
        torch.testing.assert_close(rotate_last(asked, angles), rotate_last(x.clone(), angles))


def test_rope_tables_grow_and_serve_training_after_inference() -> None:
    with torch.inference_mode():
        rope_table(10, 6, 77.0, torch.device("cpu"))
    table = rope_table(3000, 6, 77.0, torch.device("cpu"))
    assert table.shape[0] >= 3000 and not table.is_inference()
    with pytest.raises(ValueError, match="dim=5 or turned=5 is odd"):
        rope_table(4, 5, 1e4, torch.device("cpu"))
