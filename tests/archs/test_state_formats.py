"""States in few bits as data: names, what they make of declarations, bytes, refusals."""

import re
from collections import Counter

import pytest
import torch

from archs.cost import OpCost, Step, state_traffic
from archs.errors import UserError
from archs.formats import Format
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from archs.spec import FixedSpec, RowSpec, StateSpec
from archs.state_formats import Kept, StateFormat
from archs.storage import keep, state_kinds

NAMES = (*REGISTRY, *HYBRIDS)
FORMATS = (
    "kv:int8,memory:int8-ef,conv:int8",
    "kv:int4-g32,memory:float16-sr",
    "kv:fp8,memory:int4",
)
KV = RowSpec(name="kv", shape=(2, 3, 64), format=Format.of(torch.float32))
MEMORY = FixedSpec(name="memory", shape=(3, 16, 40), format=Format.of(torch.float32))


@pytest.mark.parametrize(
    "name",
    [
        "", "kv:int8", "kv:fp8-g64,memory:int8-sr,conv:bfloat16", "kv:int4-kivi,memory:int8-ef",
        "memory:float16-sr", "kv:int3-g32,memory:fp8",
    ],
)  # fmt: skip
def test_a_name_is_that_of_the_format_it_names(name: str) -> None:
    assert str(StateFormat.named(name)) == name


def test_parts_stand_in_one_order_and_spaces_do_not_count() -> None:
    assert str(StateFormat.named(" memory:int8 , kv:int4")) == "kv:int4,memory:int8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int8", "'int8' in state format 'int8' is no kind with its format; write kv:int8"),
        ("kw:int8", "Unknown kind of state 'kw'. Available: conv, index, kv, memory"),
        ("kv:int9", "Unknown state format 'int9'. Did you mean 'int8'"),
        ("kv:int8,kv:int4", "names kv twice"),
        ("kv:float32-g32", "-g32 does not go with what stands before it; float32 takes nothing"),
        ("memory:int4-ef", "-ef does not go .* int4 takes -g32, -g64, -g128, -kivi"),
        ("memory:fp8-sr", "-sr does not go"),
        ("kv:int8-kivi", "-kivi does not go .* int8 takes"),
        ("kv:int4-g48", "-g48 does not go"),
        ("kv:int4-g32-g64", "-g64 does not go"),
        ("kv:int4-g32-kivi", "blocks have groups of their own"),
        ("memory:int8-sr-ef", "take -sr or -ef"),
    ],
)
def test_unknown_names_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        StateFormat.named(name)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "row_bytes", "value_bytes"),
    [
        ("kv:int8,memory:int8", 6 * (64 + 4), 48 * (40 + 4)),
        ("kv:int8-g32,memory:int8-g32", 6 * (64 + 8), 48 * (40 + 8)),
        ("kv:int4,memory:int4", 6 * (32 + 4), 48 * (20 + 4)),
        ("kv:int3,memory:int3", 6 * (24 + 4), 48 * (15 + 4)),
        ("kv:bfloat16,memory:float16-sr", 6 * 128, 48 * 80),
        ("memory:int8-ef", 6 * 256, 48 * (40 + 4 + 20)),
    ],
)
def test_bytes_count_scales_and_residuals(name: str, row_bytes: int, value_bytes: int) -> None:
    spec = StateFormat.named(name).stored(StateSpec(rows=(KV,), fixed=(MEMORY,)))
    assert spec.rows[0].nbytes == row_bytes and spec.fixed[0].nbytes == value_bytes
    assert spec.state_bytes(10) == 10 * row_bytes + value_bytes
    # What the mixer gives and gets stays what it was.
    assert spec.rows[0].given_dtype == spec.fixed[0].given_dtype == torch.float32
    assert spec.fixed[0].shape == MEMORY.shape


def test_blocks_are_rows_of_several_tokens_and_a_value_of_those_that_wait() -> None:
    stored = StateFormat.named("kv:int2-kivi").stored(StateSpec(rows=(KV,)))
    (block,), (waiting,) = stored.rows, stored.fixed
    assert (block.every, block.block, block.shape) == (32, waiting.name, (2, 3, 32 * 64))
    assert waiting.shape == (32, 2, 3, 64) and waiting.nbytes == 32 * KV.nbytes
    # Two bits a number, and a scale and a zero point of two bytes each for every 32.
    assert block.nbytes == 6 * 32 * 64 * (2 + 32 / 32) / 8
    assert stored.bytes_per_token == 6 * 64 * 3 / 8
    reader = StateFormat.named("kv:int2-kivi").stored(
        StateSpec(rows=(RowSpec(name="kv", shape=KV.shape, format=KV.format, owner=0),))
    )
    assert reader.fixed == () and reader.rows[0].owner == 0


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("kv:int8-ef", StateSpec(rows=(KV,)), "rows are rounded once"),
        ("memory:int4-kivi", StateSpec(fixed=(MEMORY,)), "blocks are of tokens"),
        (
            "kv:int4-kivi",
            StateSpec(rows=(RowSpec(name="latent", shape=(80,), format=KV.format),)),
            r"'latent' of shape \[80\] is no such pair",
        ),
        (
            "kv:int4-kivi",
            StateSpec(rows=(RowSpec(name="kv", shape=(2, 3, 64), format=KV.format, window=8),)),
            "no such pair of whole heads of all tokens",
        ),
    ],
)
def test_what_does_not_fit_a_tensor_is_refused(name: str, spec: StateSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        StateFormat.named(name).stored(spec)


def test_a_format_of_codes_says_what_the_mixer_gives() -> None:
    with pytest.raises(UserError, match=r"'kv' is stored as int8 in groups of 64; say in which"):
        RowSpec(name="kv", shape=(2, 64), format=Kept.named("int8").format(64))


#: What each architecture has that a format may be for.
REMEMBERED = {
    arch: state_kinds(ModelSpec(arch=arch, scale=get_scale("tiny")).outline()) for arch in NAMES
}


def remembering(name: str) -> list[str]:
    """Architectures that have what a format is for."""
    wanted = StateFormat.named(name)
    return [arch for arch, kinds in REMEMBERED.items() if str(wanted.of_kinds(kinds))]


@pytest.mark.parametrize(("name", "arch"), [(n, a) for n in FORMATS for a in remembering(n)])
def test_every_architecture_keeps_and_counts_what_it_has(name: str, arch: str) -> None:
    """The cost of a step is what it was, but for the state's bytes: those of the kept spec."""
    spec = ModelSpec(arch=arch, scale=get_scale("tiny"), short_conv=4)
    plain, kept = spec.outline(), keep(spec.outline(), StateFormat.named(name))
    wanted = StateFormat.named(name).of_kinds(state_kinds(plain))
    assert kept.state_format == str(wanted) != ""
    step = Step(2, 1, 50)
    before, after = plain.cost(step), kept.cost(step)
    assert (after.flops, after.weight_bytes) == (before.flops, before.weight_bytes)
    assert after.state_bytes < before.state_bytes
    traffic = (state_traffic(layer, step) for layer in kept.state_specs())
    moved = [OpCost(name="state", **layer) for layer in traffic]
    assert after.state_bytes == sum(op.bytes for op in moved)
    # What is kept otherwise than it is computed with is told, by whichever operations move it.
    told = Counter(part for op in after.ops for part in op.coded)
    assert told == Counter(part for op in moved for part in op.coded) != Counter()
    assert kept.state_bytes(50) < plain.state_bytes(50)
    assert keep(kept, StateFormat()).state_bytes(50) == plain.state_bytes(50)


def test_a_model_keeps_what_there_is_of_a_format() -> None:
    model = ModelSpec(arch="mamba2", scale=get_scale("tiny")).outline()
    assert keep(model, StateFormat.named("kv:int8,memory:int8")).state_format == "memory:int8"
    assert keep(model, StateFormat.named("kv:int8")).state_format == ""
    latent = ModelSpec(arch="mla", scale=get_scale("tiny")).outline()
    with pytest.raises(UserError, match=re.escape("'latent' of shape [80]")):
        keep(latent, StateFormat.named("kv:int4-kivi"))
    assert latent.state_format == ""
