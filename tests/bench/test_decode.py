"""Decode of every registered architecture and hybrid: `make bench`, or

pytest tests/bench --benchmark-group-by=param:arch
"""

import pytest

from archs.registry import HYBRIDS, REGISTRY
from decodebench_pytest import DecodeBench


@pytest.mark.parametrize("context", [256, 4096])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("arch", (*REGISTRY, *HYBRIDS))
def test_decode(decode_bench: DecodeBench, arch: str, batch: int, context: int) -> None:
    info = decode_bench(arch=arch, batch=batch, context=context, scale="tiny")
    assert info["tpot_ms"] > 0
