"""The table of kernels compiled ahead of time."""

import pytest

from archs.errors import UserError
from eval.kernel_table import OPS, kernel_table


def test_every_op_compiles_soundly_for_hopper() -> None:
    rows = kernel_table(["sm_90"], every=False)
    assert [row["op"] for row in rows] == list(OPS)
    assert {row["faults"] for row in rows} == {""}
    assert all("x16B" in str(row["loads"]) for row in rows)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(UserError, match=r"sm_91.*sm_90"):
        kernel_table(["sm_91"], every=False)
