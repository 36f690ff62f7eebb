"""Arithmetic intensity of a step with several queries a sequence: published figures of grouped-tied
and grouped latent attention (arXiv 2505.21487) against what our costs say, and `predict`.
"""

import json
from typing import Any

import pytest
import torch

from archs.backbone import Model
from archs.cost import Cost, OpCost, Step
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import Scale, get_scale
from eval.predict.accelerators import hardware_of
from eval.predict.roofline import bound_by, op_ms, predict, predict_ops
from eval.predict.split import Split
from tests.eval.conftest import Command

#: Table 5: the model of 1.47B parameters, of 16 heads of 128 channels, bfloat16. Bytes of state per
#: token and layer of one GPU, alone and of two.
KV_BYTES = {
    "mha": (8192, 4096), "gqa": (2048, 1024), "gta": (1152, 640), "grouped_latent": (1152, 640),
    "mla": (1152, 1152),
}  # fmt: skip
#: Table 1 with 16 query heads, in four groups where there are KV heads: FLOPs per byte of a query
#: over a long context.
INTENSITY = {"mha": 1, "gqa": 4, "gta": 8, "grouped_latent": 16, "mla": 32}
#: The paper leaves the rotary key out; in the row of `gta`, 512 of 576 values are not of it.
COUNTED = {"gta": 512 / 576}
LONG = 1 << 22
QUERIES = (1, 2, 4)


def published(arch: str, heads: int = 16) -> Model:
    """One layer in the published shape, without storage."""
    scale = Scale(
        name="xl", d_model=128 * heads, n_layers=1, head_dim=128, vocab_size=64, seq_len=2048
    )
    latent = {"rank": 512, "nope_dim": 128, "rope_dim": 64, "v_dim": 128}
    options: dict[str, dict[str, Any]] = {
        "gqa": {"kv_heads": 4}, "gta": {"kv_heads": 4}, "mla": latent,
        "grouped_latent": latent | {"groups": 2},
    }  # fmt: skip
    chosen = {arch: options[arch]} if arch in options else {}
    return ModelSpec(arch=arch, scale=scale, overrides=chosen, hidden=8).outline(torch.bfloat16)


def attention(model: Model, queries: int, gpus: int = 1) -> OpCost:
    """The operation of one of so many GPUs."""
    cost = Split(model, hardware_of("h100"), gpus).cost(Step(1, queries, LONG, queries - 1))
    (op,) = (op for op in cost.ops if op.name == "attention")
    return op


@pytest.mark.parametrize("arch", KV_BYTES)
def test_a_token_takes_the_published_bytes(arch: str) -> None:
    (spec,) = published(arch).state_specs()
    assert (spec.bytes_per_token, spec.split(2).bytes_per_token) == KV_BYTES[arch]


@pytest.mark.parametrize("arch", INTENSITY)
@pytest.mark.parametrize("queries", QUERIES)
def test_intensity_of_a_long_context_is_the_published_one(arch: str, queries: int) -> None:
    op = attention(published(arch), queries)
    expected = queries * INTENSITY[arch] * COUNTED.get(arch, 1)
    assert op.matrix_flops / op.bytes == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("queries", QUERIES)
def test_two_gpus_share_latents_of_groups_and_each_reads_one_latent_whole(queries: int) -> None:
    """So at one intensity, of its half of the heads, each reads 640 bytes where it read 1152."""
    grouped, whole = (
        attention(published(arch), queries, gpus=2) for arch in ("grouped_latent", "mla")
    )
    assert grouped.state_read_bytes / whole.state_read_bytes == pytest.approx(640 / 1152, rel=1e-5)
    assert whole.matrix_flops / whole.bytes == pytest.approx(queries * 16, rel=1e-5)
    assert grouped.matrix_flops / grouped.bytes == pytest.approx(queries * 14.4, rel=1e-5)


@pytest.mark.parametrize(
    ("queries", "mla", "grouped"), [(1, "state", "state"), (2, "compute", "state"),
                                    (4, "compute", "compute")],
)  # fmt: skip
def test_with_128_heads_two_queries_are_compute_for_mla_alone(
    queries: int, mla: str, grouped: str
) -> None:
    """Figure 3: at two queries `mla` is beyond an H100's ridge of 295, two groups are before it."""
    rates = hardware_of("h100", launch_us=0).roofline
    ops = [attention(published(arch, 128), queries) for arch in ("mla", "grouped_latent")]
    assert [bound_by(Cost.of(op), rates) for op in ops] == [mla, grouped]
    slower, faster = (op_ms(op, rates) for op in ops)
    assert slower / faster == pytest.approx({1: 1.0, 2: 1.73, 4: 2.0}[queries], rel=0.02)


# -- predict --


def test_a_row_for_every_number_of_new_tokens(decodebench: Command) -> None:
    at = ("8b", ["h100"], [8], [16384])
    rows = predict(["mla", "grouped_latent", "gta", "gdn"], *at, new_tokens=QUERIES)
    assert [row["new_tokens"] for row in rows] == [*QUERIES] * 4
    for row in rows:
        queries = int(str(row["new_tokens"]))
        model = ModelSpec(arch=str(row["arch"]), scale=get_scale("8b")).outline(torch.bfloat16)
        cost = model.cost(Step(8, queries, 16384, queries - 1), all_logits=True)
        assert (row["step_bytes"], row["step_flops"]) == (cost.bytes, cost.flops)
        assert row["arith_intensity_pred"] == cost.flops / cost.bytes
        assert row["state_bytes"] == model.state_bytes(16384, lookback=queries - 1)
        # How many drafts are kept is unknown, so only plain decode has a time per token.
        assert (row["tpot_ms"] is None) is (row.get("time_ms") is not None) is (queries > 1)
    for arch in ("mla", "grouped_latent", "gta"):
        found = [float(str(r["arith_intensity_pred"])) for r in rows if r["arch"] == arch]
        assert found == sorted(found) and found[2] > 2 * found[0]
    argv = ("predict", "--arch", "gta", "--batch", "8", "--context", "16k", "--new-tokens", "1,2,4")
    assert json.loads(decodebench(*argv, "--json").out) == rows[6:9]
    told = decodebench(*argv).out
    assert "new tokens" in told and "time ms" in told
    assert "new tokens" not in decodebench(*argv[:-2]).out


def test_operations_of_several_new_tokens_add_up(decodebench: Command) -> None:
    at = ("1b", ["h200"], [4], [4096])
    for queries in QUERIES:
        (whole,) = predict(["mla"], *at, new_tokens=[queries])
        parts = predict_ops(["mla"], *at, new_tokens=[queries])
        assert {part["new_tokens"] for part in parts} == {queries}
        total = sum(float(str(part["time_ms"])) for part in parts)
        assert total == pytest.approx(float(str(whole["time_ms" if queries > 1 else "tpot_ms"])))
    argv = ("--arch", "mla", "--by-op", "--new-tokens", "2", "--json")
    assert {row["new_tokens"] for row in json.loads(decodebench("predict", *argv).out)} == {2}


def test_new_tokens_that_cannot_be_asked_for(decodebench: Command) -> None:
    with pytest.raises(UserError, match="new_tokens=0 must be at least 1"):
        predict(["gqa"], new_tokens=[0])
    with pytest.raises(UserError, match="new_tokens is empty"):
        predict(["gqa"], new_tokens=[])
    fit = ("predict", "--fit", "--tpot", "20ms", "--new-tokens", "2")
    decodebench(*fit).refuses("--fit finds the batch", "leave out --batch", "--new-tokens")
    drawn = ("predict", "--picture", "a.png", "--new-tokens", "2")
    decodebench(*drawn).refuses("times per token", "leave out --new-tokens")
