"""Our delta rules, decay scan, attention and rotary forms against fla-core's naive functions.

They compute in float32 whatever they are given, heads are not shared, and q is scaled by them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.torch import attention, window_mask
from kernels.rope import torch as rope
from tests.peers.forms import (
    BY_CHANNEL,
    DECAY,
    DELTA,
    FIXED_DECAY,
    LOW_RANK,
    PAGED,
    Form,
    cases,
    close,
    compare,
    compare_gradients,
    paged,
)

pytestmark = pytest.mark.peers

B, H, N, P = 2, 4, 32, 16
LENGTHS = [1, 11, 65, 130]
Op = Callable[..., tuple[Tensor, Tensor]]


def peer(name: str, function: str) -> Callable[..., Any]:
    """A function of `fla.ops.<name>.naive`."""
    from importlib import import_module

    found: Callable[..., Any] = getattr(import_module(f"fla.ops.{name}.naive"), function)
    return found


def shared(t: Tensor, heads: int) -> Tensor:
    """[B, T, G, N] for every head of its group."""
    return t.repeat_interleave(heads // t.shape[2], 2)


def decay_inputs(tokens: int, groups: int) -> dict[str, Tensor]:
    q, k = torch.randn(2, B, tokens, groups, N) * N**-0.25
    return {
        "q": q,
        "k": k,
        "v": torch.randn(B, tokens, H, P),
        "log_decay": -torch.rand(B, tokens, H).square() - 0.01,
        "state": torch.randn(B, H, N, P),
    }


def simple_gla(function: str) -> Op:
    def run(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Any:
        return peer("simple_gla", function)(
            shared(q, H), shared(k, H), v, log_decay.expand(B, v.shape[1], H), scale=1.0,
            initial_state=state, output_final_state=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("function", "groups"), [("naive_recurrent_simple_gla", 1), ("naive_chunk_simple_gla", 2)]
)
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(DECAY, LENGTHS))
def test_simple_gla(
    form: Form, dtype: torch.dtype, tokens: int, function: str, groups: int
) -> None:
    compare(form, simple_gla(function), decay_inputs(tokens, groups))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(FIXED_DECAY, LENGTHS))
def test_simple_gla_with_one_decay_per_head(
    form: Form, dtype: torch.dtype, tokens: int, groups: int
) -> None:
    inputs = decay_inputs(tokens, groups)
    inputs["log_decay"] = inputs["log_decay"][:1, :1]
    compare(form, simple_gla("naive_recurrent_simple_gla"), inputs)


@pytest.mark.parametrize(("form", "dtype", "tokens"), cases([f for f in DECAY if f.chunked], [65]))
def test_gradients_of_simple_gla(form: Form, dtype: torch.dtype, tokens: int) -> None:
    compare_gradients(form, simple_gla("naive_recurrent_simple_gla"), decay_inputs(tokens, 2))


@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(FIXED_DECAY, LENGTHS))
def test_retention(form: Form, dtype: torch.dtype, tokens: int) -> None:
    """Their decays are the paper's, 1 - 2^(-5 - head); they start from nothing."""
    i = decay_inputs(tokens, H)
    i["log_decay"] = torch.log(1 - 2.0 ** (-5 - torch.arange(H)))[None, None]
    expected = peer("retention", "naive_retention")(*(i[n].transpose(1, 2) for n in "qkv"))
    y, _ = form(**{**i, "q": i["q"] * N**-0.5, "state": torch.zeros(B, H, N, P)})
    close(y, expected.transpose(1, 2))


def delta_inputs(tokens: int, groups: int) -> dict[str, Tensor]:
    q, k = torch.randn(2, B, tokens, groups, N)
    a, b = torch.randn(2, B, tokens, H)
    return {
        "q": q,
        "k": k,
        "v": torch.randn(B, tokens, H, P),
        "a": a,
        "b": b,
        "a_log": torch.linspace(-2, 1, H),
        "dt_bias": torch.linspace(-4, 0.5, H),
        "state": torch.randn(B, H, N, P),
    }


def gated_delta(function: str) -> Op:
    def run(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
        state: Tensor,
    ) -> Any:  # fmt: skip
        q, k = (shared(F.normalize(t, dim=-1), H) for t in (q, k))
        return peer("gated_delta_rule", function)(
            q, k, v, beta=b.sigmoid(), g=-a_log.exp() * F.softplus(a + dt_bias),
            initial_state=state, output_final_state=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("function", "groups"),
    [("naive_recurrent_gated_delta_rule", 1), ("naive_chunk_gated_delta_rule", 2)],
)
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(DELTA, LENGTHS))
def test_gated_delta_rule(
    form: Form, dtype: torch.dtype, tokens: int, function: str, groups: int
) -> None:
    compare(form, gated_delta(function), delta_inputs(tokens, groups))


@pytest.mark.parametrize(("form", "dtype", "tokens"), cases([f for f in DELTA if f.chunked], [65]))
def test_gradients_of_gated_delta_rule(form: Form, dtype: torch.dtype, tokens: int) -> None:
    function = "naive_recurrent_gated_delta_rule"
    compare_gradients(form, gated_delta(function), delta_inputs(tokens, 2))


def channel_inputs(tokens: int, groups: int) -> dict[str, Tensor]:
    """As `delta_inputs`, decays by channel: some forget nearly all at once."""
    return delta_inputs(tokens, groups) | {
        "a": torch.randn(B, tokens, H, N),
        "a_log": torch.linspace(-2, 3, H),
        "dt_bias": torch.linspace(-4, 2, H * N).view(H, N),
    }


def kimi_delta(function: str) -> Op:
    def run(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
        state: Tensor,
    ) -> Any:  # fmt: skip
        q, k = (shared(F.normalize(t, dim=-1), H) for t in (q, k))
        return peer("kda", function)(
            q, k, v, beta=b.sigmoid(), g=-a_log.exp()[:, None] * F.softplus(a + dt_bias),
            initial_state=state, output_final_state=True,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("groups", [1, H])
@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(BY_CHANNEL, LENGTHS))
def test_kimi_delta_rule(form: Form, dtype: torch.dtype, tokens: int, groups: int) -> None:
    compare(form, kimi_delta("naive_recurrent_kda"), channel_inputs(tokens, groups))


@pytest.mark.parametrize(
    ("form", "dtype", "tokens"), cases([f for f in BY_CHANNEL if f.chunked], [65])
)
def test_gradients_of_kimi_delta_rule(form: Form, dtype: torch.dtype, tokens: int) -> None:
    compare_gradients(form, kimi_delta("naive_recurrent_kda"), channel_inputs(tokens, 2))


def low_rank_inputs(tokens: int) -> dict[str, Tensor]:
    """Decays as strong as RWKV-7's may be, and vectors that share nothing."""
    q, k, a, b = torch.randn(4, B, tokens, H, N) * N**-0.5
    return {
        "q": q, "k": k, "v": torch.randn(B, tokens, H, P),
        "log_decay": -0.6 * torch.rand(B, tokens, H, N), "a": a, "b": b,
        "state": torch.randn(B, H, N, P),
    }  # fmt: skip


def low_rank(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> Any:
    parts = (t.transpose(1, 2) for t in (q * N**0.5, k, v, a, b, log_decay))
    y, last = peer("generalized_delta_rule.dplr", "dplr_recurrence")(*parts, initial_state=state)
    return y.transpose(1, 2), last


@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(LOW_RANK, LENGTHS))
def test_diagonal_plus_low_rank(form: Form, dtype: torch.dtype, tokens: int) -> None:
    compare(form, low_rank, low_rank_inputs(tokens))


@pytest.mark.parametrize(
    ("form", "dtype", "tokens"), cases([f for f in LOW_RANK if f.chunked], [65])
)
def test_gradients_of_diagonal_plus_low_rank(form: Form, dtype: torch.dtype, tokens: int) -> None:
    compare_gradients(form, low_rank, low_rank_inputs(tokens))


@pytest.mark.parametrize(("form", "dtype", "tokens"), cases(DELTA, LENGTHS))
def test_delta_rule_is_the_gated_one_without_decay(
    form: Form, dtype: torch.dtype, tokens: int
) -> None:
    inputs = delta_inputs(tokens, H) | {"a_log": torch.full((H,), -torch.inf)}

    def ungated(q: Tensor, k: Tensor, v: Tensor, b: Tensor, state: Tensor, **_: Tensor) -> Any:
        q, k = (F.normalize(t, dim=-1) for t in (q, k))
        parts = (t.transpose(1, 2) for t in (q, k, v, b.sigmoid()))
        y, last = peer("delta_rule", "delta_rule_recurrence")(*parts, initial_state=state)
        return y.transpose(1, 2), last

    compare(form, ungated, inputs)


@pytest.mark.parametrize("window", [None, 1, 20], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_parallel_attn(tokens: int, heads: tuple[int, int], window: int | None) -> None:
    h, g = heads
    q, k, v = (torch.randn(B, tokens, count, N) for count in (h, g, g))
    expected, _ = peer("attn", "naive_parallel_attn")(q, k, v, window_size=window)
    how: dict[str, Any] = {"causal": True}
    if window is not None:
        how = {"mask": window_mask(tokens, window, 0, q.device)[None, None]}
    close(attention(q, k.transpose(1, 2), v.transpose(1, 2), **how), expected)


@pytest.mark.parametrize("window", [None, 1, 70], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("lengths", [[1], [63, 200, 0, 65], [700]], ids=str)
@pytest.mark.parametrize("form", PAGED, ids=str)
def test_attn_decoding(
    form: Form, lengths: list[int], heads: tuple[int, int], window: int | None
) -> None:
    q, rows, inputs = paged(lengths, heads)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    k, v = (torch.cat(t, 1)[None].transpose(1, 2) for t in rows)
    expected = peer("attn", "naive_attn_decoding")(
        q.transpose(0, 1), k, v, cu_seqlens=ends, window_size=window
    )
    close(form(q=q, window=window, **inputs), expected.transpose(0, 1))


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding_ref(interleaved: bool, tokens: int) -> None:
    from fla.modules.rotary.ops import rotary_embedding_ref

    x = torch.randn(B, tokens, H, N)
    angles = rope.rope_table(tokens + 5, N, 1e4, x.device)[5 : tokens + 5]
    cos, sin = angles[:, 0].real, angles[:, 0].imag
    order = torch.arange(N) if interleaved else rope.half_to_interleaved(N)
    expected = rotary_embedding_ref(x, cos, sin, interleaved=interleaved)
    close(rope.apply_rope(x[..., order], angles), expected[..., order])
