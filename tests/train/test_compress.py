"""Trained models in few bits: calibration, checkpoints that hold codes, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from archs.backbone import Model, cast
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.storage import Chosen, to_nearest
from archs.weights import Number, WeightFormat
from infer.engine import Engine
from tests.train.test_checkpoint import small_run
from tests.train.test_loop import RECIPE, SCALE, SPEC, VOCAB
from train.checkpoint import load_head, load_model, read_metadata, save_compressed
from train.compress import compress, observed
from train.loop import CHECKPOINT_NAME
from train.rounding import WAYS, Inputs

FORMATS = ("bfloat16", "int8", "fp8,head:bfloat16", "int4-g32-awq", "int3-g32-gptq", "int2-g32")


def text(sequences: int = 32, tokens: int = 16) -> Tensor:
    start = torch.randint(VOCAB, (sequences, 1), generator=torch.Generator().manual_seed(1))
    return (start + torch.arange(tokens)) % VOCAB


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    small_run(folder)
    return folder / CHECKPOINT_NAME


def same(first: Model, second: Model) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8))
        for name in a
    )


@pytest.mark.parametrize("weights", FORMATS)
def test_a_checkpoint_holds_the_codes(weights: str, parent: Path, tmp_path: Path) -> None:
    made = compress(load_model(parent), WeightFormat.named(weights), text())
    path = tmp_path / "packed.safetensors"
    save_compressed(path, made, parent)
    stored = WeightFormat.named(weights)
    loaded = load_model(path, dtype=stored.dtype)
    assert same(made, loaded)
    assert loaded.weight_format == ("" if stored.plain else weights)
    metadata = read_metadata(path)
    assert metadata.weights == loaded.weight_format
    assert metadata.identity == read_metadata(parent).identity
    # An engine lays codes out for this machine; files do not change with it.
    engine = Engine(loaded, max_context=32)
    engine.generate([[1, 2, 3]], 4)
    save_compressed(tmp_path / "again.safetensors", loaded, parent)
    assert same(made, load_model(tmp_path / "again.safetensors", dtype=stored.dtype))
    # What is not packed widens without a change; what is packed gives wider products.
    ids = text(2, 8)
    narrow, wide = load_model(path, dtype=stored.dtype)(ids), load_model(path)(ids)
    assert wide.dtype == torch.float32
    assert (narrow.float() - wide).norm() < 0.05 * wide.norm()


@pytest.mark.parametrize("arch", ["gqa", "cla", "mla", "gdn", "mamba1", "mamba2:mha=1:1"])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_methods_keep_more_of_a_model_than_the_nearest_codes(arch: str, method: str) -> None:
    spec = replace(SPEC, arch=arch, hidden=64, scale=SCALE.with_options({"n_layers": 2}))
    ids = text(64, 16)

    def lost(weights: str) -> float:
        model = spec.build(seed=3)
        # Channels of unlike sizes, as those of trained models are.
        with torch.no_grad():
            for block in model.layers:
                block.norm_mixer.weight[::7] *= 8
                block.norm_mlp.weight[::5] *= 8  # type: ignore[union-attr]
            before = model(ids)
            after = cast(compress(model, WeightFormat.named(weights), ids), torch.float32)(ids)
        return float((after - before).norm() / before.norm())

    plain = lost("int3-g32,head:bfloat16")
    assert lost(f"int3-g32-{method},head:bfloat16") < 0.95 * plain


def test_calibration_goes_through_blocks_that_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's inputs are those that the stored ones before it give."""
    spec = replace(SPEC, scale=SCALE.with_options({"n_layers": 2}))
    seen: list[Tensor] = []

    def watch(weight: Tensor, number: Number, inputs: Inputs) -> Chosen:
        seen.append(inputs.moments.clone())
        return to_nearest("", weight, number)

    monkeypatch.setitem(WAYS, "gptq", watch)
    ids = text(8, 16)
    compress(spec.build(), WeightFormat.named("int2-g32-gptq"), ids)
    assert len(seen) == 8
    plain = spec.build()
    with torch.no_grad(), observed(plain.layers[0]) as first, observed(plain.layers[1]) as second:
        plain(ids)
    # The first block's are off by the embedding in 8 bits alone, the second's by a block in 2 bits.
    pairs = (seen[0], first["mixer.qkv"].moments), (seen[4], second["mixer.qkv"].moments)
    away = [float((a - b).norm() / b.norm()) for a, b in pairs]
    assert away[0] < 0.01 and away[1] > 4 * away[0]
    assert isinstance(plain.layers[0].mixer.qkv.weight, torch.nn.Parameter)


def test_a_head_for_drafts_stays_with_its_trunk(tmp_path: Path) -> None:
    small_run(tmp_path, replace(RECIPE, mtp_weight=0.3))
    path = tmp_path / CHECKPOINT_NAME
    made = compress(load_model(path), WeightFormat.named("int4-g32"))
    save_compressed(tmp_path / "packed.safetensors", made, path)
    trunk = load_model(tmp_path / "packed.safetensors")
    head, before = (
        load_head(file, model)
        for file, model in ((tmp_path / "packed.safetensors", trunk), (path, load_model(path)))
    )
    assert torch.equal(head.join.weight, before.join.weight) and head.weight_format == "int4-g32"


def test_what_has_no_codes_or_no_text_is_refused(parent: Path, tmp_path: Path) -> None:
    stored = WeightFormat.named("int4-g32-awq")
    with pytest.raises(UserError, match="chooses codes by calibration text; give some, or leave"):
        compress(load_model(parent), stored)
    with pytest.raises(UserError, match=r"20 tokens .* too few for awq: .* has 32 columns"):
        compress(load_model(parent), stored, text(2, 10))
    packed = compress(load_model(parent), stored, text())
    with pytest.raises(UserError, match="stored as int4-g32 already"):
        compress(packed, WeightFormat.named("int4-g32"))
    wide = ModelSpec(arch="gqa", scale=get_scale("nano")).build()
    with pytest.raises(UserError, match=r"groups of 64 columns, wider than the rows of a matrix"):
        compress(wide, WeightFormat.named("int4-g64-gptq"), torch.randint(4096, (16, 128)))
    save_compressed(tmp_path / CHECKPOINT_NAME, packed, parent)
    with pytest.raises(UserError, match=r"packed as int4-g32-awq, which cannot be trained on"):
        small_run(tmp_path)


def altered(path: Path, target: Path, change: Callable[[dict[str, object]], object]) -> Path:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = dict(file.metadata())
    values = json.loads(header["checkpoint"])
    change(values)
    save_file(tensors, target, {**header, "checkpoint": json.dumps(values)})
    return target


def test_headers_that_lie_about_their_tensors_are_refused(parent: Path, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    save_compressed(path, compress(load_model(parent), WeightFormat.named("int8")), parent)
    for name, says in (
        ("int7-g32", r"checkpoint .*Unknown weight format 'int7-g32'"),
        ("fp8", r"does not fit the model: .*codes is .* of int8 there and .* of float8_e4m3fn"),
        ("int4-g32", r"does not fit the model"),
        ("", r"does not fit the model"),
    ):
        given = altered(path, tmp_path / "other.safetensors", lambda v, n=name: v.update(weights=n))
        with pytest.raises(UserError, match=says):
            load_model(given)
