"""Norm, projection, rotation and paged write of one token: against the oracle, and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.products.project_append as module
from kernels.products.project_append import project_append_ref, serves
from tests.kernels.interpreter import interpreted

PAGE = 16
EPS = 1e-3


def operands(
    heads: int, groups: int, dim: int, k: int, *, added: bool = True, past: int = 37
) -> dict[str, Any]:
    """A token at `past`, whose page is not where its position would be."""
    pages = past // PAGE + 1
    table = torch.randperm(pages + 2)[:pages].int()[None]
    positions = torch.arange(past + 8)[:, None] * 0.7 ** torch.arange(dim // 2)
    return {
        "x": torch.randn(1, 1, k), "residual": torch.randn(1, 1, k) if added else None,
        "norm_weight": torch.randn(k),
        "weight": torch.randn((heads + 2 * groups) * dim, k) * k**-0.5,
        "cos_sin": torch.stack((positions.cos(), positions.sin()), -1),
        "k_pool": torch.randn(groups, (pages + 2) * PAGE, dim),
        "v_pool": torch.randn(groups, (pages + 2) * PAGE, dim),
        "page_table": table, "lengths": torch.tensor([past], dtype=torch.int32),
    }  # fmt: skip


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "k"),
    [(2, 1, 16, 64), (4, 4, 32, 200), (3, 1, 48, 1024), (2, 2, 64, 2048), (1, 1, 16, 4104)],
)
def test_equals_the_oracle(heads: int, groups: int, dim: int, k: int, added: bool) -> None:
    given = operands(heads, groups, dim, k, added=added)
    expected = project_append_ref(*given.values(), eps=EPS, page_size=PAGE)
    with interpreted():
        q, total = module.project_append(*given.values(), eps=EPS, page_size=PAGE)
    assert q.shape == (1, 1, heads, dim)
    for got, wanted in zip((q, given["k_pool"], given["v_pool"]), (expected[0], *expected[2:]),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(total, expected[1])


def test_a_token_without_a_page_is_not_written() -> None:
    given = operands(2, 1, 16, 64)
    given["page_table"][0, -1] = -1
    before = given["k_pool"].clone(), given["v_pool"].clone()
    with interpreted():
        module.project_append(*given.values(), eps=EPS, page_size=PAGE)
    assert torch.equal(given["k_pool"], before[0]) and torch.equal(given["v_pool"], before[1])


def test_heads_of_a_joint_pool_lie_apart() -> None:
    """Keys and values as the store holds them: one tensor, heads at a stride."""
    given = operands(2, 2, 16, 64)
    pool = torch.stack((given["k_pool"], given["v_pool"]))
    expected = project_append_ref(*given.values(), eps=EPS, page_size=PAGE)
    given["k_pool"], given["v_pool"] = pool.unbind(0)
    with interpreted():
        module.project_append(*given.values(), eps=EPS, page_size=PAGE)
    torch.testing.assert_close(pool.double(), torch.stack(expected[2:]), rtol=1e-4, atol=1e-4)


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "two rows": (r"x=.*one row of 64", lambda g: {"x": torch.zeros(2, 64)}),
    "residual": (r"residual=.*64 contiguous", lambda g: {"residual": torch.zeros(32)}),
    "norm": (r"norm_weight=.*64 contiguous", lambda g: {"norm_weight": torch.zeros(64).half()}),
    "rows": (r"weight=.*\(H \+ 2 \* 1\) \* 16 rows", lambda g: {"weight": torch.zeros(40, 64)}),
    "no query": (r"weight=.*\(H \+ 2 \* 1\)", lambda g: {"weight": torch.zeros(32, 64)}),
    "dim": (r"k_pool=.*multiple of 16", lambda g: {"k_pool": torch.zeros(1, 48, 8)}),
    "dtype": (r"k_pool=.*float32", lambda g: {"k_pool": g["k_pool"].half()}),
    "unlike": (r"v_pool=.*each head contiguous", lambda g: {"v_pool": torch.zeros(1, 32, 16)}),
    "angles": (r"cos_sin=.*positions, 8, 2", lambda g: {"cos_sin": torch.zeros(9, 4, 2)}),
    "table": (r"page_table=.*int32", lambda g: {"page_table": g["page_table"].long()}),
    "lengths": (r"lengths=.*int32", lambda g: {"lengths": torch.zeros(2, dtype=torch.int32)}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, change = REFUSALS[case]
    given = operands(2, 1, 16, 64)
    given |= change(given)
    with interpreted():
        monkeypatch.setattr(type(module.project_append_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.project_append(*given.values(), eps=EPS, page_size=PAGE)


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_other_operands_are_left_to_the_pieces() -> None:
    given = operands(2, 1, 16, 64)
    around = given["residual"], given["norm_weight"], given["weight"], given["k_pool"]
    assert serves(given["x"], *around)
    wide: Tensor = torch.zeros(2, 1, 64)
    assert not serves(wide, *around)
    assert not serves(given["x"], *around[:3], given["k_pool"].half())
