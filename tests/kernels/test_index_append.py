"""Index keys into pages against their float64 oracle and the torch form, in the interpreter.

Only valid queries and the pool rows of new tokens may change; everything that may not be read is
NaN or has no page, and whatever else was there must come out bit for bit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.sparse.append as module
from kernels.pages.write import FLOATS, page_write_ref
from kernels.rope.torch import rope_table
from kernels.sparse.append import index_append_ref
from kernels.sparse.torch import turn_first
from tests.kernels.interpreter import interpreted

TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def operands(
    lengths: tuple[int, ...] = (3, 0, 30),
    *,
    tokens: int = 2,
    heads: int = 4,
    widths: tuple[int, int] = (32, 16),
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    held: torch.dtype | None = None,
    new: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Queries and keys as columns of a wider projection of NaN; a pool of NaN, shuffled pages."""
    dim, rotary = widths
    batch, most = len(lengths), -(-(max(lengths) + tokens) // page_size)
    pages = batch * most + 2
    down = torch.full((batch, tokens, 48 + (heads + 1) * dim), torch.nan, dtype=dtype)
    key, q = down[..., 48 : 48 + dim], down[..., 48 + dim :].unflatten(-1, (heads, dim))
    for part in (q, key):
        part.copy_(torch.randn(part.shape) * 2 + 0.5)
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    for b, length in enumerate(lengths):
        count = tokens if new is None else new[b]
        key[b, count:] = torch.nan
        written = torch.arange(length, length + count) // page_size
        table[b, [j for j in range(most) if j not in written]] = 10**6
    angles = rope_table(max(lengths) + tokens, rotary, 10000.0, torch.device("cpu"))
    angles = torch.view_as_real(angles)[: max(lengths) + tokens, 0].contiguous()
    return {
        "q": q, "key": key, "weight": torch.rand(dim).to(dtype) + 0.5,
        "bias": torch.randn(dim).to(dtype), "cos_sin": angles, "page_table": table,
        "lengths": int32(*lengths), "eps": 1e-3, "page_size": page_size,
        "pool": torch.full((pages * page_size, dim), torch.nan, dtype=held or dtype),
        "new": None if new is None else int32(*new),
    }  # fmt: skip


def torch_form(given: dict[str, Any]) -> dict[str, Tensor]:
    """What a step without this kernel does: norm, rotation, the paged write."""
    q, past, rotary = given["q"].clone(), given["lengths"].long(), 2 * given["cos_sin"].shape[1]
    at = (past[:, None] + torch.arange(q.shape[1])).clamp(max=len(given["cos_sin"]) - 1)
    angles = given["cos_sin"][at][:, :, None]
    dim = (q.shape[-1],)
    key = F.layer_norm(given["key"], dim, given["weight"], given["bias"], given["eps"])
    key = turn_first(key[:, :, None], angles, rotary)[:, :, 0]
    pages = ("page_table", "lengths", "page_size", "new")
    pool = page_write_ref(key, given["pool"], **{name: given[name] for name in pages})
    return {"q": turn_first(q, angles, rotary), "pool": pool}


def assert_equals_the_oracle(given: dict[str, Any]) -> None:
    oracle = dict(zip(("q", "pool"), index_append_ref(**given), strict=True))
    by_torch, valid = torch_form(given), torch.ones(given["q"].shape[:2], dtype=torch.bool)
    if given["new"] is not None:
        valid = torch.arange(valid.shape[1]) < given["new"][:, None]
    before = given["key"].clone()
    with interpreted():
        module.index_append(**given)
    for name, expected in oracle.items():
        got, form = given[name], by_torch[name]
        if name == "q":
            got, expected, form = got[valid], expected[valid], form[valid]
        loosest = max((given["q"].dtype, got.dtype), key=lambda t: TOLERANCES[t]["rtol"])
        for other in (expected, form.double()):
            torch.testing.assert_close(got.double(), other, equal_nan=True, **TOLERANCES[loosest])
    torch.testing.assert_close(given["key"], before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_positions_and_shuffled_pages(tokens: int, page_size: int) -> None:
    assert_equals_the_oracle(operands((63, 0), tokens=tokens, page_size=page_size))


@pytest.mark.parametrize("heads", [1, 7, 40])
@pytest.mark.parametrize("widths", [(32, 16), (96, 10), (128, 64), (7, 2), (8, 8)], ids=str)
def test_heads_and_widths(heads: int, widths: tuple[int, int]) -> None:
    assert_equals_the_oracle(operands((100,), tokens=1, heads=heads, widths=widths))


@pytest.mark.parametrize("held", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype: torch.dtype, held: torch.dtype) -> None:
    assert_equals_the_oracle(operands(dtype=dtype, held=held))


def test_padded_tokens_are_not_written() -> None:
    assert_equals_the_oracle(operands((3, 0, 30, 15), tokens=3, new=(3, 0, 1, 2)))


def test_a_token_without_a_page_or_an_angle_stays_outside() -> None:
    given = operands((14, 14), tokens=6)
    before, expected = given["q"].clone(), torch_form(given)
    first = torch_form(given | {"new": int32(2, 0)})
    given["page_table"] = given["page_table"][:, :1].contiguous()
    given["page_table"][1, 0] = -1
    given["cos_sin"] = given["cos_sin"][:18].contiguous()
    with interpreted():
        module.index_append(**given)
    torch.testing.assert_close(given["q"][:, :4], expected["q"][:, :4])
    assert torch.equal(given["q"][:, 4:], before[:, 4:])
    torch.testing.assert_close(
        given["pool"], first["pool"], equal_nan=True, **TOLERANCES[torch.float32]
    )


def test_a_token_past_the_angles_keeps_its_key_as_it_is_normed() -> None:
    given = operands((4,), tokens=1)
    given["cos_sin"] = given["cos_sin"][:4].contiguous()
    with interpreted():
        module.index_append(**given)
    row = int(given["page_table"][0, 0]) * 16 + 4
    normed = F.layer_norm(given["key"][0, 0], (32,), given["weight"], given["bias"], 1e-3)
    torch.testing.assert_close(given["pool"][row], normed, **TOLERANCES[torch.float32])


def test_an_empty_batch_launches_nothing() -> None:
    given = operands()
    for name in ("q", "key", "page_table", "lengths"):
        given[name] = given[name][:0]
    with interpreted():
        module.index_append(**given)
    assert given["pool"].isnan().all()


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, K, H, d\]", lambda a: {"q": a["q"][0]}),
    "q dtype": ("q=.*bfloat16", lambda a: {"q": a["q"].double()}),
    "q heads apart": ("q=.*strides", lambda a: {"q": torch.zeros(3, 2, 4, 40)[..., :32]}),
    "q overlaps": ("q=.*strides", lambda a: {"q": torch.zeros(1, 2, 4, 32).expand(3, -1, -1, -1)}),
    "no heads": ("q=.*tokens and heads", lambda a: {"q": a["q"][:, :, :0]}),
    "d": ("d=1 must be 2 to 512", lambda a: {"q": torch.zeros(3, 2, 4, 1)}),
    "key": (r"key=.*\[3, 2, 32\]", lambda a: {"key": a["key"][:, :1]}),
    "key dtype": ("key=.*float32", lambda a: {"key": a["key"].half()}),
    "weight": (r"weight=.*\[32\]", lambda a: {"weight": a["weight"][:16]}),
    "bias": (r"bias=.*\[32\]", lambda a: {"bias": a["bias"][:16]}),
    "eps": ("eps=-1.0 must", lambda a: {"eps": -1.0}),
    "cos_sin": ("cos_sin=.*r at most 32", lambda a: {"cos_sin": torch.zeros(40, 17, 2)}),
    "pool width": (r"pool=.*pages \* 16, 32\]", lambda a: {"pool": a["pool"][:, :16]}),
    "pool rows": (r"pool=.*pages \* 96", lambda a: {"page_size": 96}),
    "pool dtype": ("pool=.*float", lambda a: {"pool": a["pool"].to(torch.int8)}),
    "table": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    "lengths": ("lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    "new": (r"new=.*\[3\]", lambda a: {"new": int32(1, 2)}),
    "device": ("pool=meta must be on", lambda a: {"pool": a["pool"].to("meta")}),
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
        monkeypatch.setattr(type(module.index_append_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.index_append(**changed)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.index_append(**operands())
