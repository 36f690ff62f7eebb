"""Options of architectures on our kernels, in Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from eval.proof.conformance import error_of
from tests.infer.test_device import TOLERANCE, subject_of
from tests.kernels.interpreter import interpreted


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


@pytest.mark.parametrize(
    ("arch", "options", "pieces"),
    [
        ("nsa", {"block": 16, "picks": 3, "window": 20}, [84, 1, 3, 7, 1]),
        ("nsa", {"block": 32, "picks": 3, "window": 70}, [180, 1, 3, 7, 1]),
        ("mla", {"positions": False}, [11, 1, 3, 4]),
        ("mamba3", {"rank": 4, "groups": 2}, [21, 1, 3, 4]),
        ("mamba3", {"rank": 2, "rope_fraction": 0.0}, [11, 1, 3, 4]),
        ("gta", {"kv_heads": 2}, [11, 1, 3, 4, 9]),
        ("grouped_latent", {"rank": 128, "q_rank": 48}, [11, 1, 3, 4]),
        ("grouped_latent", {"positions": False}, [11, 1, 3]),
        ("gqa", {"qk_norm": True, "output_gate": True, "rope_dim": 16}, [13, 1, 3, 5]),
        ("mqa", {"output_gate": True, "rope_dim": 0}, [13, 1, 3]),
        ("swa", {"qk_norm": True, "rope_dim": 32, "window": 9}, [21, 1, 3, 5]),
        ("cla", {"qk_norm": True, "output_gate": True, "rope_dim": 16}, [13, 1, 3]),
        ("gdn", {"beta_max": 2.0}, [11, 1, 3, 4]),
        ("gdn", {"beta_max": 2.0, "products": 2}, [11, 1, 3, 4]),
        ("kda", {"channel_gates": True}, [11, 1, 3, 4]),
        ("gqa", {"learned_sinks": True}, [13, 1, 3, 9]),
        ("swa", {"learned_sinks": True, "qk_norm": True, "window": 9, "sinks": 2}, [21, 1, 3, 5]),
        ("cla", {"tied_kv": True}, [13, 1, 3, 9]),
        ("cla", {"tied_kv": True, "qk_norm": True, "learned_sinks": True}, [140, 1, 3, 5]),
        ("cla", {"tied_kv": True, "qk_norm": True, "output_gate": True, "rope_dim": 16}, [13, 1]),
    ],
)
def test_options_equal_the_torch_form(
    arch: str, options: dict[str, Any], pieces: list[int]
) -> None:
    """Parts of pages, pages and several for a picked block; latents that are not turned; several
    columns of B and C, and states that do not turn; KV heads and latents that share a key; heads
    that are normed, gated, partly rotated or not at all; strengths up to 2, two products a
    token, and gates by channel; learned sinks; rows that are keys and values.
    """
    subject = subject_of(arch, layers=2 if arch == "cla" else 1)
    subject.spec = replace(subject.spec, overrides={arch: options})
    subject.model = subject.spec.build()
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if name.endswith(("k_norm.weight", "kv_norm.weight", "sink_logits")):
                parameter.normal_(1.0, 0.3)
    tokens = subject.tokens(2, sum(pieces))
    expected, engine = subject.expected(tokens), subject.engine(2, sum(pieces))
    slots = [engine.store.add(), engine.store.add()]
    assert error_of(subject.run(engine, slots, tokens, pieces), expected) <= TOLERANCE


@pytest.mark.parametrize("arch", ["mha", "mqa"])
def test_one_token_is_rotated_in_part_by_the_product_that_makes_it(arch: str) -> None:
    subject = subject_of(arch, layers=1)
    subject.spec = replace(subject.spec, overrides={arch: {"rope_dim": 16}})
    subject.model = subject.spec.build()
    tokens = subject.tokens(1, 14)
    expected, engine = subject.expected(tokens), subject.engine(1, 14)
    got = subject.run(engine, [engine.store.add()], tokens, [11, 1, 1, 1])
    assert error_of(got, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("arch", "options"), [("gqa", {"learned_sinks": True}), ("cla", {"tied_kv": True})]
)
def test_options_train_by_torch(arch: str, options: dict[str, Any]) -> None:
    subject = subject_of(arch)
    subject.spec = replace(subject.spec, overrides={arch: options})
    subject.model = subject.spec.build()
    ids = subject.tokens(2, 9)
    logits = subject.model.use("triton")(ids).detach()
    assert error_of(logits, subject.expected(ids)) <= TOLERANCE
