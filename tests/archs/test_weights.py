"""Names of weight formats: what they say, their bytes, and what is refused."""

import pytest
import torch

from archs.errors import UserError
from archs.weights import NARROW_NAMES, Number, WeightFormat


@pytest.mark.parametrize(
    "name",
    [
        "float32", "bfloat16", "int8", "fp8", "w8a8-qat", "int4-g64", "int3-g128-gptq",
        "int2-g32-awq", "int4-g64,head:bfloat16", "int4-g64-awq,head:fp8,gates:int4-g64",
        "int8,gates:int8",
    ],
)  # fmt: skip
def test_a_name_is_what_its_format_is_called(name: str) -> None:
    assert str(WeightFormat.named(name)) == name


def test_parts_that_are_as_usual_are_left_out_of_the_name() -> None:
    given = WeightFormat.named("int4-g64, head:int8, gates:bfloat16")
    assert str(given) == "int4-g64" and given == WeightFormat.named("int4-g64")
    assert (given.head.name, given.gates.name) == ("int8", "bfloat16")
    assert given.dtype == torch.bfloat16 and WeightFormat.named("float32").dtype == torch.float32
    assert given.storages == ("", "int4-g64", "int8")


@pytest.mark.parametrize(
    ("name", "rows", "columns", "nbytes"),
    [
        ("float32", 3, 5, 60),
        ("int8", 3, 40, 3 * (40 + 2)),
        ("fp8", 3, 40, 3 * (40 + 2)),
        ("int4-g32", 3, 64, 3 * (32 + 2 * 4)),
        # The second group of a row is filled up.
        ("int4-g64", 48, 100, 48 * (64 + 2 * 4)),
        ("int3-g32", 5, 96, 5 * (36 + 3 * 4)),
        ("int2-g128", 5, 128, 5 * (32 + 4)),
    ],
)
def test_bytes_include_scales_zero_points_and_whole_groups(
    name: str, rows: int, columns: int, nbytes: int
) -> None:
    assert Number.named(name).nbytes(rows, columns) == nbytes


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int5-g64", "Unknown weight format 'int5-g64'. Did you mean 'int4-g64'?"),
        ("int4", "Unknown weight format 'int4'"),
        ("int4-g48", "Unknown weight format 'int4-g48'"),
        ("int4-g64-rtn", "Unknown way to choose codes 'rtn'. Available: awq, gptq, qat"),
        ("int8-awq", "'int8-awq': awq chooses codes of integers of 2 to 4 bits; take one of int4"),
        ("bfloat16-qat", "'bfloat16-qat': plain numbers are not rounded; take int8"),
        ("int4-g64,tail:int8", "'tail:int8' in weight format .* write head:int8 or gates:int8"),
        ("int4-g64,head", "'head' in weight format"),
        ("int4-g64,head:int4-g64", "head:int4-g64: rows of an embedding are read by number"),
        ("float32,head:int8", "plain numbers are the same in all of a model"),
        ("", "Unknown weight format ''"),
    ],
)
def test_what_is_no_format_is_refused(name: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        WeightFormat.named(name)


def test_every_narrow_format_has_fewer_bits_than_a_byte() -> None:
    for name in NARROW_NAMES:
        number = Number.named(name)
        assert number.nbytes(16, 1024) < 16 * 1024 and number.narrow and not number.plain
