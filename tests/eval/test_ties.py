"""Which tokens that parted are a tie, of plain states and of those in few bits."""

import pytest
import torch

from archs.backbone import Model
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.state_formats import StateFormat
from archs.storage import keep, rounds_values
from eval.measure.ties import TIE, tie_gap
from infer.engine import Engine

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def model_of(arch: str, state: str = "") -> Model:
    scale = get_scale("nano").with_options({"vocab_size": 31})
    return keep(ModelSpec(arch=arch, scale=scale).build(seed=1).eval(), StateFormat.named(state))


def test_the_gap_between_two_tokens_is_relative_to_the_largest_logit() -> None:
    model = model_of("gqa")
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]))[0, -1].double()
    expected = float((logits[5] - logits[9]).abs() / logits.abs().max())
    found = tie_gap(model, TOKENS, 5, 9)
    assert found.apart == pytest.approx(expected, rel=1e-4)
    assert found.limit == TIE[torch.float32] and not found.is_tie
    assert tie_gap(model, TOKENS, 5, 5).is_tie


@pytest.mark.parametrize(("arch", "state"), [("gqa", "kv:int2-g32"), ("gdn", "memory:int4")])
def test_logits_of_a_state_in_few_bits_are_those_that_its_codes_give(arch: str, state: str) -> None:
    model = model_of(arch, state)
    engine = Engine(model, max_sequences=1, max_context=len(TOKENS), backend="torch")
    slot = engine.store.add()
    for token in TOKENS:
        logits = engine.extend_last([slot], torch.tensor([[token]]))[0].double()
    one, other = logits.topk(2).indices.tolist()
    found = tie_gap(model, TOKENS, one, other)
    expected = float((logits[one] - logits[other]) / logits.abs().max())
    assert found.apart == pytest.approx(expected, rel=1e-3)
    exact = tie_gap(model_of(arch), TOKENS, one, other)
    assert found.apart != pytest.approx(exact.apart, rel=1e-3)


def test_a_tie_is_as_wide_as_ties_between_codes_or_roundings_make_it() -> None:
    """Rows in eight bits leave it narrow; values that every step rounds may drift as far as single
    steps do, and fewer bits go farther.
    """
    limits = [
        tie_gap(model_of(arch, state), TOKENS, 1, 2).limit
        for arch, state in (("gqa", "kv:int8"), ("gdn", "memory:int8"), ("gdn", "memory:int4"))
    ]
    assert TIE[torch.float32] <= limits[0] < 0.01 < limits[2]
    assert limits[0] < limits[1] < limits[2]


def test_rows_are_rounded_once_and_values_at_every_step() -> None:
    assert not rounds_values(model_of("gqa", "kv:int4-g32"))
    assert not rounds_values(model_of("gdn"))
    assert rounds_values(model_of("gdn", "conv:int8"))
    assert rounds_values(model_of("gdn:gqa=3:1", "kv:int8,memory:int8"))
