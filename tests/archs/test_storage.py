"""Whole models in few bits: bytes declared, held and read; correct decode; gates kept apart."""

import pytest
import torch

from archs.backbone import Model
from archs.cost import Step
from archs.errors import UserError
from archs.layers import Projection
from archs.ops.matrix import declared_bytes, storages_of, weights_of
from archs.packed import Packed, Stacked
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from archs.storage import store
from archs.weights import WeightFormat
from eval.measure.agreement import agreement
from eval.predict.roofline import resident_bytes
from infer.engine import Engine

ARCHS = (*REGISTRY, *HYBRIDS)


def model(arch: str, weights: str, scale: str = "tiny") -> Model:
    built = ModelSpec(arch=arch, scale=get_scale(scale)).build(seed=0)
    return store(built, WeightFormat.named(weights)).eval()


@pytest.mark.parametrize("arch", ARCHS)
def test_bytes_are_declared_held_and_counted(arch: str) -> None:
    spec = ModelSpec(arch=arch, scale=get_scale("tiny"))
    whole = model(arch, "int4-g32")
    held = sum(t.nbytes for t in (*whole.parameters(), *whole.buffers()))
    assert held == resident_bytes(whole) == sum(map(declared_bytes, weights_of(whole)))
    assert sum(w.numel() for w in weights_of(whole)) == sum(
        p.numel() for p in spec.outline().parameters()
    )
    # A step reads all of it, and a row of the embedding more; of pooling's biases it reads a row.
    row = declared_bytes(whole.embedding.weight) // whole.vocab_size
    biases = [
        p for name, p in whole.named_parameters() if name.endswith(("pool_bias", "index_bias"))
    ]
    unread = sum(bias[1:].nbytes for bias in biases)
    assert whole.cost(Step(1, 1, 64)).weight_bytes == held + row - unread
    outline = store(spec.outline(), WeightFormat.named("int4-g32"))
    assert outline.cost(Step(3, 1, 64)) == whole.cost(Step(3, 1, 64))
    # Weights that other products read stay what they were.
    plain = sum(m.weight.nbytes for m in whole.modules() if isinstance(m, Projection) and m.plain)
    assert held - plain < 0.22 * (sum(p.nbytes for p in spec.outline().parameters()) - plain)


@pytest.mark.parametrize("arch", ARCHS)
def test_prefill_and_decode_agree_with_the_stored_numbers(arch: str) -> None:
    found = agreement(model(arch, "int4-g32,gates:int8"), context=64, batches=(1, 2))
    assert found.holds and found.error > 0


@pytest.mark.parametrize("weights", ["int8", "fp8,head:bfloat16", "int3-g64", "int2-g32-awq"])
def test_every_kind_of_format_decodes(weights: str) -> None:
    whole = model("gdn", weights)
    assert agreement(whole, context=64, batches=(1, 3)).holds
    assert whole.weight_format == weights


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int4-g32", "w8a8"])
def test_compiled_steps_read_packed_weights(weights: str) -> None:
    found = agreement(model("gqa", weights), context=64, batches=(2,), compiled=True)
    assert found.holds and found.error > 0


def test_exact_products_are_those_of_the_float32_form() -> None:
    """In float64 the engine is exact; a wrong code would show."""
    whole = store(ModelSpec(arch="gqa", scale=get_scale("tiny")).build(seed=0),
                  WeightFormat.named("int4-g32"))  # fmt: skip
    ids = torch.randint(whole.vocab_size, (2, 40))
    wide = whole.to(torch.float64)
    for matrix in weights_of(wide):
        if isinstance(matrix, Packed):
            matrix.give(torch.float64)
    expected = wide(ids)
    engine = Engine(wide, max_sequences=2, max_context=64)
    slots = [engine.store.add() for _ in range(2)]
    engine.prefill(slots, ids[:, :30].tolist())
    found = torch.cat([engine.extend(slots, ids[:, at : at + 1]) for at in range(30, 40)], 1)
    torch.testing.assert_close(found, expected[:, 30:], rtol=1e-9, atol=1e-9)


def test_gates_are_kept_apart_unless_asked_for() -> None:
    apart, together = model("gdn", "int4-g32"), model("gdn", "int4-g32,gates:int4-g32")
    mixed = apart.layers[0].mixer.q_k_v_z_b_a
    assert isinstance(mixed.stored, Stacked)
    assert [part.storage for part in mixed.stored.blocks] == ["int4-g32", ""]
    assert [part.shape[0] for part in mixed.stored.blocks] == [mixed.out_features - 8, 8]
    packed = together.layers[0].mixer.q_k_v_z_b_a.stored
    assert [part.storage for part in packed.blocks] == ["int4-g32"] * 2
    # A matrix of step sizes alone stays what it was.
    assert isinstance(model("mamba1", "int4-g32").layers[0].mixer.dt.stored, torch.Tensor)
    assert isinstance(model("mla", "int4-g32").layers[0].mixer.kv_up.stored, torch.Tensor)
    assert storages_of(apart) == ["", "int4-g32", "int8"]


def test_plain_formats_are_a_dtype() -> None:
    whole = model("mamba2", "bfloat16")
    assert whole.embedding.weight.dtype == torch.bfloat16 and whole.weight_format == ""
    assert whole.layers[0].mixer.A_log.dtype == torch.float32


def test_what_cannot_be_stored_is_refused() -> None:
    with pytest.raises(UserError, match="stored as int8 already; store a model of plain numbers"):
        store(model("gqa", "int8"), WeightFormat.named("int4-g32"))
    with pytest.raises(UserError, match="groups of 64 columns, wider than the rows"):
        model("gqa", "int4-g64", "nano")
