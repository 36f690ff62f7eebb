"""Paged writes, plain and in 8 bits, against their oracle in the interpreter, and compiled ahead.

Only the rows of new tokens may change in a pool; everything that may not be read is NaN or has no
page, and whatever else the pool held must come out bit for bit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.pages.write as module
from kernels.pages.write import FLOATS, coded_ref, page_write_ref
from tests.kernels.interpreter import interpreted

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def operands(
    lengths: tuple[int, ...] = (3, 0, 30),
    *,
    tokens: int = 2,
    planes: tuple[int, ...] = (2,),
    width: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    held: torch.dtype | None = None,
    new: tuple[int, ...] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Rows that are a view of wider NaN ones; a pool of NaN (or noise) behind shuffled pages."""
    batch, held = len(lengths), held or dtype
    most = -(-(max(lengths) + tokens) // page_size)
    pages = batch * most + 2
    wide = torch.full((batch, tokens + 1, *planes, width + 16), torch.nan, dtype=dtype)
    rows = wide[:, :tokens, ..., :width]
    rows.copy_(torch.randn(rows.shape))
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    pool = torch.full((*planes, pages * page_size, width), torch.nan)
    for b, length in enumerate(lengths):
        count = tokens if new is None else new[b]
        rows[b, count:] = torch.nan
        written = torch.arange(length, length + count) // page_size
        table[b, [j for j in range(most) if j not in written]] = 10**6
    if held in EIGHT_BIT:
        options["scales"] = torch.full(pool.shape[:-1], torch.nan)
        pool = torch.randint(-99, 99, pool.shape).float()
    options |= {} if new is None else {"new": int32(*new)}
    return {
        "rows": rows, "pool": pool.to(held), "page_table": table, "lengths": int32(*lengths),
        "page_size": page_size, **options,
    }  # fmt: skip


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def expected_of(given: dict[str, Any]) -> list[Tensor]:
    """The pool, and the scales of one that holds codes."""
    how = {n: t for n, t in given.items() if n not in ("rows", "pool", "scales")}
    rows, pool = given["rows"], given["pool"]
    if "scales" not in given:
        return [page_write_ref(rows, pool, **how)]
    codes, scales = coded_ref(rows, pool.dtype)
    held = page_write_ref(scales, given["scales"][..., None], **how)
    return [page_write_ref(codes, pool, **how), held[..., 0]]


def assert_equals_the_oracle(given: dict[str, Any]) -> None:
    expected = expected_of(given)
    before = given["rows"].clone()
    with interpreted():
        module.page_write(**given)
    assert torch.equal(bits(given["pool"]), bits(expected[0]))
    if "scales" in given:
        assert torch.equal(bits(given["scales"]), bits(expected[1]))
    assert torch.equal(bits(given["rows"]), bits(before))


@pytest.mark.parametrize("planes", [(), (1,), (3,), (2, 3), (1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("width", [1, 20, 64, 576])
def test_planes_and_widths(planes: tuple[int, ...], width: int) -> None:
    assert_equals_the_oracle(operands(planes=planes, width=width))


@pytest.mark.parametrize("width", [2000, 1024])
def test_rows_wider_than_a_tile(width: int) -> None:
    assert_equals_the_oracle(operands((5,), width=width, dtype=torch.bfloat16))


@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("tokens", [1, 7, 65])
def test_tokens_across_pages(page_size: int, tokens: int) -> None:
    assert_equals_the_oracle(operands((63, 0), tokens=tokens, page_size=page_size))


@pytest.mark.parametrize("held", [*FLOATS, *EIGHT_BIT], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("planes", [(), (3,)], ids=str)
def test_dtypes(dtype: torch.dtype, held: torch.dtype, planes: tuple[int, ...]) -> None:
    assert_equals_the_oracle(operands(dtype=dtype, held=held, planes=planes, width=48))


@pytest.mark.parametrize("held", [torch.float32, torch.int8], ids=str)
def test_padded_tokens_are_neither_read_nor_written(held: torch.dtype) -> None:
    assert_equals_the_oracle(operands((3, 0, 30, 15), tokens=3, new=(3, 0, 1, 2), held=held))


@pytest.mark.parametrize("sinks", [0, 4])
def test_of_a_long_prompt_only_the_window_and_the_sinks_are_kept(sinks: int) -> None:
    given = operands((0, 10), tokens=40, first_kept=int32(33, 7), sinks=sinks)
    given["page_table"][0, 1] = 10**6
    assert_equals_the_oracle(given)


def test_a_token_without_a_page_is_not_written() -> None:
    given = operands((14, 14), tokens=6)
    given["page_table"] = given["page_table"][:, :1].contiguous()
    given["page_table"][1, 0] = -1
    [expected] = expected_of({**given, "pool": given["pool"].clone(), "new": int32(2, 0)})
    with interpreted():
        module.page_write(**given)
    assert torch.equal(bits(given["pool"]), bits(expected))


@pytest.mark.parametrize(
    ("held", "values", "expected"),
    [
        (torch.int8, [0.25, 0.75, 1.25, -0.25, -0.75, 63.5, -63.5], [0, 2, 2, 0, -2, 127, -127]),
        (torch.float8_e4m3fn, [0.5, 0.53125, 224.0, -224.0, 0.0], [1, 1, 448, -448, 0]),
    ],
    ids=str,
)
def test_the_largest_has_the_last_code_and_halves_round_to_even(
    held: torch.dtype, values: list[float], expected: list[float]
) -> None:
    given = operands((4,), tokens=1, planes=(1,), width=len(values), held=held)
    given["rows"][0, 0, 0] = torch.tensor(values)
    assert_equals_the_oracle(given)
    row = given["page_table"][0, 0] * 16 + 4
    assert given["scales"][0, row] == 0.5
    assert given["pool"][0, row].float().tolist() == expected


@pytest.mark.parametrize("held", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf], ids=str)
def test_what_is_no_number_stays_none_and_zeros_stay_zeros(held: torch.dtype, wrong: float) -> None:
    given = operands((4,), tokens=2, planes=(2,), width=20, held=held)
    given["rows"][0, 0, 0] = 0
    given["rows"][0, 1, 1, 7] = wrong
    with interpreted():
        module.page_write(**given)
    row = int(given["page_table"][0, 0]) * 16 + 4
    read = given["pool"].float() * given["scales"][..., None]
    assert read[0, row].eq(0).all() and given["scales"][0, row] == 0
    assert not read[1, row + 1, 7].isfinite()
    assert read[0, row + 1].isfinite().all() and read[1, row].isfinite().all()


def test_views_of_pools_and_of_rows() -> None:
    given = operands(planes=(2, 3))
    pool = torch.full((2, 3, 2, *given["pool"].shape[2:]), torch.nan)
    given["rows"] = given["rows"].transpose(0, 1).contiguous().transpose(0, 1)
    given["pool"] = pool[:, :, 1]
    assert_equals_the_oracle(given)
    assert pool[:, :, 0].isnan().all()


def test_an_empty_batch_launches_nothing() -> None:
    given = operands()
    for name in ("rows", "page_table", "lengths"):
        given[name] = given[name][:0]
    with interpreted():
        module.page_write(**given)
    assert given["pool"].isnan().all()


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "rows rank": (r"rows=.*\[B, K, R\]", lambda a: {"rows": a["rows"][0, 0]}),
    "rows dtype": ("rows=.*bfloat16", lambda a: {"rows": a["rows"].double()}),
    "rows empty": ("rows=.*tokens and channels", lambda a: {"rows": a["rows"][:, :0]}),
    "rows stride": ("rows=.*last stride", lambda a: {"rows": a["rows"].mT.contiguous().mT}),
    "rows planes": (
        "rows=.*flatten",
        lambda a: {"rows": torch.zeros(3, 2, 2, 5, 32)[:, :, :, :3]},
    ),
    "pool planes": ("pool=.*must be", lambda a: {"pool": a["pool"][:1]}),
    "pool width": ("pool=.*must be", lambda a: {"pool": a["pool"][..., :16]}),
    "pool rows": (r"pool=.*pages \* 96", lambda a: {"page_size": 96}),
    "pool dtype": ("pool=.*bfloat16", lambda a: {"pool": a["pool"].double()}),
    "pool strides": ("pool=.*strides", lambda a: {"pool": a["pool"].repeat(1, 1, 2)[..., :32]}),
    "page_size": ("page_size=0 must", lambda a: {"page_size": 0}),
    "sinks": ("sinks=-1 must", lambda a: {"sinks": -1}),
    "table dtype": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    "table batch": ("page_table=.*int32", lambda a: {"page_table": a["page_table"][:2]}),
    "table empty": ("page_table=.*int32", lambda a: {"page_table": a["page_table"][:, :0]}),
    "lengths": ("lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    "new": (r"new=.*\[3\]", lambda a: {"new": int32(1, 2)}),
    "first_kept": ("first_kept=.*int32", lambda a: {"first_kept": torch.zeros(3)}),
    "scales unwanted": ("scales=.*8 bits", lambda a: {"scales": a["pool"][..., 0]}),
    "scales missing": ("scales=None .*8 bits", lambda a: {"pool": a["pool"].to(torch.int8)}),
    "scales shape": (
        r"scales=.*float32 \[2, ",
        lambda a: {"pool": a["pool"].to(torch.int8), "scales": torch.ones(2)},
    ),
    "scales apart": (
        "scales=.*rows of a plane together",
        lambda a: {"pool": a["pool"].to(torch.int8), "scales": a["pool"][..., 0]},
    ),
    "pool device": ("pool=meta must be on", lambda a: {"pool": a["pool"].to("meta")}),
    "new device": ("new=meta must be on", lambda a: {"new": a["lengths"].to("meta")}),
}


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands()
    given["pool"].zero_()
    message, change = REFUSALS[case]
    with interpreted():
        monkeypatch.setattr(type(module.page_write_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.page_write(**(given | change(given)))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.page_write(**operands())
