"""Errors are written when there is one: a launch must not wait for the text of none."""

import pytest
import torch

from kernels.checks import Form, form, require
from tests.kernels import (
    test_index_append,
    test_index_scan,
    test_latent_append,
    test_mla_decode,
    test_pooled_append,
    test_pooled_decode,
    test_rope_append,
)
from tests.kernels.interpreter import interpreted


def test_a_tensor_is_described_in_an_error() -> None:
    with pytest.raises(ValueError, match=r"^q=float32\[2, 3\] with strides \[3, 1\] on cpu must"):
        require(False, "q", form(torch.zeros(2, 3)), "must be another")


def test_nothing_is_described_where_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def described(self: Form) -> str:
        raise AssertionError("described")

    monkeypatch.setattr(Form, "__str__", described)
    with interpreted():
        tensors, options = test_mla_decode.operands([20])
        test_mla_decode.module.mla_decode(*tensors, **options)
        test_rope_append.module.rope_append(**test_rope_append.operands())
        test_latent_append.module.latent_append(**test_latent_append.operands())
        test_index_append.module.index_append(**test_index_append.operands())
        test_index_scan.module.index_scan(**test_index_scan.operands())
        test_pooled_append.module.pooled_append(**test_pooled_append.operands())
        tensors, options = test_pooled_decode.operands([20])
        test_pooled_decode.module.pooled_decode(**tensors, **options)


def test_a_rule_is_written_only_where_it_is_broken() -> None:
    class Never:
        def __str__(self) -> str:
            raise AssertionError("a launch does not wait for its messages")

    require(True, "q", Never(), "must be {}", Never())
    with pytest.raises(ValueError, match=r"^q=7 must be \[3, 4\] on cpu$"):
        require(False, "q", 7, "must be [{}, {}] on {}", 3, 4, "cpu")
