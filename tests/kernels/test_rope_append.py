"""Rotary append against its float64 oracle and the torch form, in the interpreter and compiled.

Only valid queries and keys and the pool rows of new tokens may change; everything that may not be
read is NaN or has no page, and whatever else was there must come out bit for bit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.rope.append as module
from kernels.pages.write import FLOATS, page_write_ref
from kernels.rope.append import rope_append_ref
from kernels.rope.torch import rope_table, rotate
from tests.kernels.interpreter import interpreted

TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 1e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-5},
}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def operands(
    lengths: tuple[int, ...] = (3, 0, 30),
    *,
    tokens: int = 2,
    heads: tuple[int, int] = (4, 2),
    dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    held: torch.dtype | None = None,
    new: tuple[int, ...] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Columns of a wider projection of NaN; pools of NaN behind shuffled pages; exact angles."""
    h, g = heads
    batch, most = len(lengths), -(-(max(lengths) + tokens) // page_size)
    pages = batch * most + 2
    wide = torch.full((batch, tokens, h + 2 * g + 1, dim), torch.nan, dtype=dtype)
    qkv = wide[:, :, : h + 2 * g]
    qkv.copy_(torch.randn(qkv.shape))
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    positions = torch.zeros(max(lengths) + tokens, dtype=torch.bool)
    for b, length in enumerate(lengths):
        count = tokens if new is None else new[b]
        qkv[b, count:] = torch.nan
        positions[length : length + count] = True
        written = torch.arange(length, length + count) // page_size
        table[b, [j for j in range(most) if j not in written]] = 10**6
    # A table that ends with the last valid position, NaN wherever no token sits.
    angles = torch.view_as_real(rope_table(len(positions), dim, 10000.0, torch.device("cpu")))
    angles = angles[: int(positions.nonzero().max()) + 1, 0].clone()
    angles[~positions[: len(angles)]] = torch.nan
    pools = torch.full((2, g, pages * page_size, dim), torch.nan, dtype=held or dtype)
    options |= {} if new is None else {"new": int32(*new)}
    return {
        "qkv": qkv, "cos_sin": angles, "k_pool": pools[0], "v_pool": pools[1],
        "page_table": table, "lengths": int32(*lengths),
        "heads": h, "kv_heads": g, "page_size": page_size, **options,
    }  # fmt: skip


def torch_form(given: dict[str, Any]) -> dict[str, Tensor]:
    """`kernels.rope.torch.rotate`, then the paged writes: what a step without this kernel does."""
    qkv, h, g = given["qkv"].clone(), given["heads"], given["kv_heads"]
    at = given["lengths"].long()[:, None] + torch.arange(qkv.shape[1])
    at = at.clamp(max=len(given["cos_sin"]) - 1)
    rotate(qkv[:, :, : h + g], given["cos_sin"][at][:, :, None])
    pages = ("page_table", "lengths", "page_size", "new", "first_kept", "sinks")
    how = {name: given[name] for name in pages if name in given}
    k_pool = page_write_ref(qkv[:, :, h : h + g], given["k_pool"], **how)
    v_pool = page_write_ref(qkv[:, :, h + g :], given["v_pool"], **how)
    return {"qkv": qkv, "k_pool": k_pool, "v_pool": v_pool}


def assert_equals_the_oracle(given: dict[str, Any]) -> None:
    """Near the oracle, and the torch form to the last bit (padded tokens are NaN in both)."""
    oracle = dict(zip(("qkv", "k_pool", "v_pool"), rope_append_ref(**given), strict=True))
    exact = torch_form(given)
    with interpreted():
        module.rope_append(**given)
    for name, expected in oracle.items():
        got = given[name]
        loosest = max((given["qkv"].dtype, got.dtype), key=lambda t: TOLERANCES[t]["rtol"])
        tolerance = TOLERANCES[loosest]
        torch.testing.assert_close(got.double(), expected, equal_nan=True, **tolerance)
        torch.testing.assert_close(got, exact[name], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_positions_and_shuffled_pages(tokens: int, page_size: int) -> None:
    assert_equals_the_oracle(operands((63, 0), tokens=tokens, page_size=page_size))


@pytest.mark.parametrize("heads", [(1, 1), (7, 7), (6, 2), (16, 1), (40, 8)], ids=str)
@pytest.mark.parametrize("dim", [16, 80, 128, 256])
def test_heads_and_their_widths(heads: tuple[int, int], dim: int) -> None:
    assert_equals_the_oracle(operands((100,), tokens=1, heads=heads, dim=dim))


@pytest.mark.parametrize("held", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [64, 512])
def test_dtypes(dtype: torch.dtype, held: torch.dtype, dim: int) -> None:
    assert_equals_the_oracle(operands(dtype=dtype, held=held, dim=dim))


def test_padded_tokens_are_left_alone() -> None:
    assert_equals_the_oracle(operands((3, 0, 30, 15), tokens=3, new=(3, 0, 1, 2)))


@pytest.mark.parametrize("sinks", [0, 4])
def test_of_a_long_prompt_only_the_window_and_the_sinks_are_kept(sinks: int) -> None:
    given = operands((0, 10), tokens=40, first_kept=int32(33, 7), sinks=sinks)
    given["page_table"][0, 1] = 10**6
    assert_equals_the_oracle(given)


def test_a_token_without_a_page_or_an_angle_stays_outside() -> None:
    given = operands((14, 14), tokens=6)
    before = given["qkv"].clone()
    short = {**given, **{n: given[n].clone() for n in ("qkv", "k_pool", "v_pool")}}
    given["page_table"] = given["page_table"][:, :1].contiguous()
    given["page_table"][1, 0] = -1
    given["cos_sin"] = given["cos_sin"][:18].contiguous()
    with interpreted():
        module.rope_append(**given)
    expected = torch_form(short)
    assert torch.equal(given["qkv"][:, :4], expected["qkv"][:, :4])
    assert torch.equal(given["qkv"][:, 4:], before[:, 4:])
    first = torch_form(short | {"new": int32(2, 0)})
    for name in ("k_pool", "v_pool"):
        torch.testing.assert_close(given[name], first[name], equal_nan=True, rtol=0, atol=0)


def test_views_of_pools_and_of_a_batch_of_transposed_tokens() -> None:
    given = operands((5, 20), tokens=3)
    both = torch.full((2, 2, *given["k_pool"].shape[1:]), torch.nan)
    given["qkv"] = given["qkv"].transpose(0, 1).contiguous().transpose(0, 1)
    given["k_pool"], given["v_pool"] = both[:, 0], both[:, 1]
    assert_equals_the_oracle(given)


def test_a_step_in_two_halves_is_the_whole_step() -> None:
    whole = operands((7, 31), tokens=4)
    halves = {**whole, **{n: whole[n].clone() for n in ("qkv", "k_pool", "v_pool")}}
    with interpreted():
        module.rope_append(**whole)
        for first in (0, 2):
            half = {"qkv": halves["qkv"][:, first : first + 2]}
            module.rope_append(**(halves | half | {"lengths": whole["lengths"] + first}))
    for name in ("qkv", "k_pool", "v_pool"):
        torch.testing.assert_close(halves[name], whole[name], equal_nan=True, rtol=0, atol=0)


def test_an_empty_batch_launches_nothing() -> None:
    given = operands()
    for name in ("qkv", "page_table", "lengths"):
        given[name] = given[name][:0]
    with interpreted():
        module.rope_append(**given)
    assert given["k_pool"].isnan().all()


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "qkv rank": (r"qkv=.*\[B, K, H", lambda a: {"qkv": a["qkv"][0]}),
    "qkv dtype": ("qkv=.*bfloat16", lambda a: {"qkv": a["qkv"].double()}),
    "qkv heads": (r"qkv=.*4 \+ 2 \* 2 heads", lambda a: {"qkv": a["qkv"][:, :, 1:]}),
    "qkv head stride": ("qkv=.*strides", lambda a: {"qkv": torch.zeros(3, 2, 8, 48)[..., :32]}),
    "qkv token stride": (
        "qkv=.*strides",
        lambda a: {"qkv": torch.zeros(3, 2, 264)[..., :256].unflatten(-1, (8, 32))},
    ),
    "qkv overlaps": (
        "qkv=.*strides",
        lambda a: {"qkv": torch.zeros(1, 2, 8, 32).expand(3, -1, -1, -1)},
    ),
    "qkv start": ("qkv=.*16 bytes", lambda a: {"qkv": torch.zeros(1537)[1:].view(3, 2, 8, 32)}),
    "kv_heads": ("kv_heads=0 must", lambda a: {"kv_heads": 0}),
    "heads": ("heads=3 must be .*kv_heads=2", lambda a: {"heads": 3}),
    "head_dim": ("head_dim=24 must", lambda a: {"qkv": torch.zeros(3, 2, 8, 24)}),
    "head_dim large": ("head_dim=528 must", lambda a: {"qkv": torch.zeros(3, 2, 8, 528)}),
    "K": ("K=0 must", lambda a: {"qkv": a["qkv"][:, :0]}),
    "cos_sin dtype": ("cos_sin=.*float32", lambda a: {"cos_sin": a["cos_sin"].half()}),
    "cos_sin shape": ("cos_sin=.*16, 2", lambda a: {"cos_sin": a["cos_sin"][:, :8]}),
    "cos_sin complex": (
        "cos_sin=.*float32",
        lambda a: {"cos_sin": torch.view_as_complex(a["cos_sin"])},
    ),
    "cos_sin strides": ("cos_sin=.*contiguous", lambda a: {"cos_sin": a["cos_sin"][::2]}),
    "pool heads": ("k_pool=.*must be", lambda a: {"k_pool": a["k_pool"][:1]}),
    "pool width": ("v_pool=.*must be", lambda a: {"v_pool": a["v_pool"][..., :16]}),
    "pool rows": (r"k_pool=.*pages \* 96", lambda a: {"page_size": 96}),
    "pool dtype": ("v_pool=.*bfloat16", lambda a: {"v_pool": a["v_pool"].to(torch.int8)}),
    "pool strides": (
        "k_pool=.*strides",
        lambda a: {"k_pool": a["k_pool"].repeat(1, 1, 2)[..., :32]},
    ),
    "page_size": ("page_size=0 must", lambda a: {"page_size": 0}),
    "sinks": ("sinks=-1 must", lambda a: {"sinks": -1}),
    "table dtype": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    "table batch": ("page_table=.*int32", lambda a: {"page_table": a["page_table"][:2]}),
    "lengths": ("lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    "new": (r"new=.*\[3\]", lambda a: {"new": int32(1, 2)}),
    "first_kept": ("first_kept=.*int32", lambda a: {"first_kept": torch.zeros(3)}),
    "pool device": ("v_pool=meta must be on", lambda a: {"v_pool": a["v_pool"].to("meta")}),
    "new device": ("new=meta must be on", lambda a: {"new": a["lengths"].to("meta")}),
}


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands()
    message, change = REFUSALS[case]
    changed = given | change(given)
    with interpreted():
        monkeypatch.setattr(type(module.rope_append_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.rope_append(**changed)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.rope_append(**operands())
