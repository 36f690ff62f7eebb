"""The table of kernels compiled ahead of time."""

import pytest

from archs.errors import UserError
from eval.kernel_table import OPS, kernel_table


def test_every_op_compiles_soundly_for_hopper() -> None:
    rows = kernel_table(["sm_90"], every=False)
    assert [row["op"] for row in rows] == list(OPS)
    assert {row["faults"] for row in rows} == {""}
    assert all("x16B" in str(row["loads"]) for row in rows)


@pytest.mark.slow
def test_every_configuration_compiles_soundly_for_every_target() -> None:
    rows = kernel_table(["sm_80", "sm_90", "sm_100", "gfx942"], every=True)
    assert [row for row in rows if row["faults"]] == []


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(UserError, match=r"sm_91.*sm_90"):
        kernel_table(["sm_91"], every=False)
