"""Families stand in the table; of tables without them, those of the architectures of that time."""

import pandas as pd
import pytest

from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from eval.measure.family import state_family
from eval.results.families import KNOWN, families_of, known_family


@pytest.mark.parametrize("arch", KNOWN)
def test_what_is_known_by_name_is_what_the_state_declares(arch: str) -> None:
    assert arch in (*REGISTRY, *HYBRIDS)
    model = ModelSpec(arch=arch, scale=get_scale("tiny"), hidden=0).outline()
    assert KNOWN[arch] == state_family(model.state_specs())


@pytest.mark.parametrize(
    ("arch", "family"),
    [("mamba2:gqa=7:1", "hybrid"), ("mha:gqa=1:1", "softmax"), ("gdn:mine.py=1:1", None)],
)
def test_a_pattern_is_of_the_family_of_its_mixers(arch: str, family: str | None) -> None:
    assert known_family(arch) == family


def test_what_a_row_says_comes_before_the_name() -> None:
    rows = {"arch": ["gqa", "new", "new", "older"], "family": ["window", "", "latent", ""]}
    long = pd.DataFrame(rows).assign(status="ok", measure="", scale="", value=0.0, context=0)
    assert families_of(long) == {"gqa": "window", "new": "latent", "older": "unknown"}
